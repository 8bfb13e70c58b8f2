"""What ``quantmill.load`` gives is what ``from_pretrained`` gives, for many architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import quantmill
from quantmill_transformers.testing import MODELS, linears, sample, write

Small = Callable[[str], Path]
NAMES = sorted(MODELS)
GENERATING = [name for name in NAMES if MODELS[name].generates]
QUANTIZED = [name for name in NAMES if name != "falcon"]
# What stays float although it is a plain linear; by default the output head.
KEPT: Mapping[str, set[str]] = {
    "bert": {"cls.predictions.decoder"},
    "bert-classifier": {"classifier"},
    "vit": {"classifier"},
    "resnet": set(),
    "whisper": {"proj_out"},
    "qwen2-moe": {"lm_head", *(f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2))},
    "t5": {
        "lm_head",
        *(f"encoder.block.{index}.layer.1.DenseReluDense.wo" for index in range(2)),
        *(f"decoder.block.{index}.layer.2.DenseReluDense.wo" for index in range(2)),
    },
}


def pretrained(name: str, folder: Path, **options: Any) -> Any:
    return getattr(transformers, MODELS[name].cls).from_pretrained(folder, **options)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those that no checkpoint stores too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def logits(name: str, model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**sample(name, model)).logits
    return found


def distance(one: Tensor, two: Tensor) -> float:
    return float((one - two).float().norm() / two.float().norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_float_model_is_the_one_of_from_pretrained(name: str, small: Small) -> None:
    theirs, ours = pretrained(name, small(name)), quantmill.load(small(name))
    assert type(ours) is type(theirs) and not ours.training
    mine, yours = tensors(ours), tensors(theirs)
    assert list(mine) == list(yours)
    for key, tensor in yours.items():
        assert mine[key].dtype == tensor.dtype, key
        assert mine[key].requires_grad == tensor.requires_grad, key
        assert torch.equal(mine[key], tensor), key
    assert torch.equal(logits(name, ours), logits(name, theirs))
    shared = [
        {key for key in found if found[key] is not first[key]}
        for found, first in [(tensors(model), dict(_firsts(model))) for model in (ours, theirs)]
    ]
    assert shared[0] == shared[1], "the same weights are tied"


def _firsts(model: nn.Module) -> dict[str, Any]:
    """Each name with its tensor where it is met first, None for another name of a tied one."""
    once = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: once.get(key) for key in tensors(model)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_those_of_from_pretrained(name: str, dtype: str, small: Small) -> None:
    theirs = pretrained(name, small(name), dtype=getattr(torch, dtype))
    ours: Any = quantmill.load(small(name), dtype=dtype)
    mine = tensors(ours)
    for key, tensor in tensors(theirs).items():
        assert mine[key].dtype == tensor.dtype, key
        assert torch.equal(mine[key], tensor), key
    assert ours.dtype == theirs.dtype and ours.config.dtype == theirs.config.dtype


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_those_of_from_pretrained(name: str, small: Small) -> None:
    theirs, ours = pretrained(name, small(name)), quantmill.load(small(name))
    mine: Any = ours
    assert mine.config.to_dict() == theirs.config.to_dict()
    assert mine.config._attn_implementation == theirs.config._attn_implementation
    if theirs.can_generate():
        assert mine.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("name", GENERATING)
def test_generation_is_that_of_from_pretrained(name: str, small: Small) -> None:
    theirs, ours = pretrained(name, small(name)), quantmill.load(small(name))
    inputs = {k: v for k, v in sample(name, theirs).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 5, "do_sample": False}
    mine: Any = ours
    assert torch.equal(mine.generate(**inputs, **options), theirs.generate(**inputs, **options))


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_takes_the_linears_that_are_there(name: str, small: Small) -> None:
    pytest.importorskip("quantmill_bnb")
    plan = quantmill.plan(small(name), "bnb-nf4")
    plan.raise_errors()
    planned = {item.name for item in plan.modules if item.action == "quantize"}
    model = pretrained(name, small(name))
    assert planned == linears(model) - KEPT.get(name, {"lm_head"})


def _stored(model: nn.Module) -> dict[str, Tensor]:
    names = model.state_dict().keys()
    return {key: buffer for key, buffer in model.named_buffers() if key in names}


@pytest.mark.parametrize("name", QUANTIZED)
def test_nf4_computes_what_its_weights_say(name: str, small: Small) -> None:
    pytest.importorskip("quantmill_bnb")
    ours: Any = quantmill.load(small(name), "bnb-nf4", dtype="bfloat16")
    job = ours.quantmill_job
    planned = {item.target.name for item in job.plan.modules if item.action == "quantize"}
    # Experts that one product takes together compute with the core's linear.
    classes = ("QuantmillLinear4bit", "FormLinear")
    replaced = {key for key, part in ours.named_modules() if type(part).__name__ in classes}
    assert replaced == planned != set()
    quantized = logits(name, ours)
    reference = logits(
        name, quantmill.dequantize(quantmill.load(small(name), "bnb-nf4", dtype="bfloat16"))
    )
    assert torch.isfinite(quantized).all()
    assert distance(quantized, reference) < 0.1


@pytest.mark.parametrize("name", QUANTIZED)
def test_nf4_planned_memory_is_the_real_one(name: str, small: Small) -> None:
    pytest.importorskip("quantmill_bnb")
    ours: Any = quantmill.load(small(name), "bnb-nf4")
    plan = ours.quantmill_job.plan
    stored = {**dict(ours.named_parameters()), **_stored(ours)}
    found = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    states = [part.weight.quant_state for part in ours.modules() if hasattr(part, "quant_state")]
    found += sum(4 * (state.absmax.numel() + state.code.numel()) for state in states)
    assert plan.totals["bytes_memory"] == pytest.approx(found, abs=64)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_written_nf4_model_loads_to_the_same(name: str, small: Small, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    quantmill.quantize(small(name), tmp_path / "out", "bnb-nf4")
    ours, again = quantmill.load(small(name), "bnb-nf4"), quantmill.load(tmp_path / "out")
    state, reloaded = ours.state_dict(), again.state_dict()
    assert set(state) == set(reloaded)
    for key, tensor in state.items():
        assert torch.equal(tensor, reloaded[key]), key
    job: Any = again.quantmill_job
    assert {item.code for item in job.findings} <= {"QM-BNB-010", "QM-TARGET-014"}


@pytest.mark.parametrize("name", GENERATING)
def test_nf4_generates(name: str, small: Small) -> None:
    pytest.importorskip("quantmill_bnb")
    ours: Any = quantmill.load(small(name), "bnb-nf4")
    inputs = {k: v for k, v in sample(name, ours).items() if not k.startswith("decoder")}
    made = ours.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape[1] == (6 if MODELS[name].kind == "pair" else 9 + 5)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"resnet"}))
def test_adapters_below_a_16_bit_base_get_gradients(name: str, tmp_path: Path) -> None:
    """Norms in float32 meet masks, experts, convolutions and biases that stayed in 16 bits."""
    pytest.importorskip("quantmill_bnb")
    folder = write(name, tmp_path / "model", dtype=torch.bfloat16)
    model: Any = quantmill.load(folder, "bnb-nf4", training=True, gradient_checkpointing=False)
    assert model.training and not any(tensor.requires_grad for tensor in model.parameters())
    norms = [part for part in model.modules() if "Norm" in type(part).__name__]
    assert all(tensor.dtype == torch.float32 for part in norms for tensor in part.parameters())
    found = model(**sample(name, model)).logits
    assert found.dtype == torch.bfloat16 and found.requires_grad
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    models = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    for first in {id(part): part for part in map(_embeddings, models)}.values():
        first.register_forward_hook(keep)
    model(**sample(name, model)).logits.float().square().mean().backward()
    assert seen
    for output in seen:
        assert output.grad is not None and torch.isfinite(output.grad).all()
        assert output.grad.abs().sum() > 0


def _embeddings(model: Any) -> nn.Module:
    found: nn.Module = model.get_input_embeddings()
    return found


def test_a_model_without_checkpointing_is_told_of(small: Small) -> None:
    pytest.importorskip("quantmill_bnb")
    model: Any = quantmill.load(small("resnet"), "bnb-nf4", training=True)
    assert "QM-FINAL-002" in {item.code for item in model.quantmill_job.findings}
    with pytest.raises(quantmill.FindingsError):
        quantmill.load(small("resnet"), "bnb-nf4", training=True, strict=True)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_dequantized_model_saves_and_loads_as_a_float_one(
    name: str, small: Small, tmp_path: Path
) -> None:
    pytest.importorskip("quantmill_bnb")
    model: Any = quantmill.dequantize(quantmill.load(small(name), "bnb-nf4"))
    model.save_pretrained(tmp_path / "out")
    again = pretrained(name, tmp_path / "out")
    assert torch.equal(logits(name, again), logits(name, model))
