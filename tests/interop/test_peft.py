"""PEFT on every backend: gradients, fifty steps, merging and back, through the activation."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantmill
from quantmill.findings import QuantmillError
from quantmill.hookspecs import hookimpl
from quantmill.host import Host, default_host

pytestmark = pytest.mark.interop
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
qt = pytest.importorskip("quantmill_transformers")
ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny-llama"
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
ON_THE_FLY = (
    "bnb-nf4",
    "bnb-nf4-dq",
    "bnb-int8",
    "hqq-4",
    "quanto-int8",
    "fp8-block",
    "fp8-row",
    "ct-int4",
    "ct-fp8",
    "torchao-int8wo",
    "gguf-q8_0",
)
CALIBRATED = ("gptq-4", "awq-4")
LEARNING = (*ON_THE_FLY[:4], "fp8-block", "torchao-int8wo", *CALIBRATED)
"""Those that take fifty steps; of the others equal gradients say as much."""


@pytest.fixture(autouse=True)
def _active() -> Iterator[None]:
    with qt.activated("*"):
        yield


@pytest.fixture(scope="module")
def batch() -> Tensor:
    """Few tokens often, which is soon learnt."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 24, (4, 24), generator=generator)


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory, batch: Tensor
) -> Callable[[str], dict[str, Any]]:
    """How to load a Llama with a method; calibrated ones are written once."""
    root = tmp_path_factory.mktemp("calibrated")

    def arguments(method: str) -> dict[str, Any]:
        if method not in default_host().presets:
            pytest.skip(f"no installed plugin has {method}")
        if method in ON_THE_FLY:
            return {"source": TINY, "quantization_config": method}
        if not (root / method).exists():
            quantmill.quantize(TINY, root / method, method, calibration=batch, length=24)
        return {"source": root / method}

    return arguments


def load(arguments: dict[str, Any], *, dtype: str = "float32", **options: Any) -> Any:
    rest = dict(arguments)
    return transformers.AutoModelForCausalLM.from_pretrained(
        rest.pop("source"), dtype=dtype, quantmill_options=options, **rest
    )


def lora(**options: Any) -> Any:
    return lora_on(TARGETS, **options)


def lora_on(targets: Any, **options: Any) -> Any:
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options
    )


def adapted(model: Any, scale: float = 0.02) -> Any:
    """With an adapter whose B is not zero, so that every weight of it has a gradient."""
    torch.manual_seed(0)
    made = peft.get_peft_model(model, lora())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (scale * noise).to(parameter.dtype)
    return made


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def off(one: Tensor, two: Tensor) -> float:
    return float((one - two).float().norm() / two.float().norm())


@pytest.mark.parametrize("method", [*ON_THE_FLY, *CALIBRATED])
def test_gradients_are_those_of_the_float_model_with_the_same_weights(
    method: str, source: Any, batch: Tensor
) -> None:
    ours = adapted(load(source(method), training=True, gradient_checkpointing=False))
    reference = load(source(method)).dequantize()
    reference.requires_grad_(False)
    theirs = adapted(reference.train())
    found, wanted = gradients(ours, batch[:2]), gradients(theirs, batch[:2])
    assert found.keys() == wanted.keys()
    # The library's 4-bit linears compute in the config's bfloat16.
    worst = max(off(found[name], grad) for name, grad in wanted.items())
    assert worst < (0.05 if method.startswith("bnb-nf4") else 1e-5), worst


def _kinds(model: nn.Module) -> list[str]:
    return [type(part).__name__ for part in model.modules() if hasattr(part, "lora_A")]


def kind(method: str) -> str:
    """bitsandbytes' own linears have PEFT's own classes."""
    own = {"bnb-int8": "Linear8bitLt", "bnb-nf4": "Linear4bit", "bnb-nf4-dq": "Linear4bit"}
    return own.get(method, "LoraLinear")


@pytest.mark.parametrize("method", LEARNING)
def test_fifty_steps_of_lora_learn(method: str, source: Any, batch: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpointing = method.endswith("-dq")
    base = load(
        source(method), dtype="bfloat16", training=True, gradient_checkpointing=checkpointing
    )
    assert base.is_gradient_checkpointing is checkpointing
    model = peft.get_peft_model(base, lora())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    assert set(_kinds(model)) == {kind(method)}
    for step in range(50):
        rows = batch[(step * 2) % 4 : (step * 2) % 4 + 2]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8]), losses
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    fresh = load(source(method), dtype="bfloat16", training=True)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    model.eval()
    with torch.inference_mode():
        one, two = model(input_ids=batch[:1]).logits, again(input_ids=batch[:1]).logits
    assert off(one, two) < 0.02


def test_all_linear_means_quantized_ones_too(source: Any) -> None:
    model = peft.get_peft_model(load(source("hqq-4")), lora_on("all-linear"))
    assert len(model.targeted_module_names) == 14 and set(_kinds(model)) == {"LoraLinear"}
    assert not any("lm_head" in name for name in model.targeted_module_names)
    float_model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    theirs = peft.get_peft_model(float_model, lora_on("all-linear"))
    assert set(theirs.targeted_module_names) == set(model.targeted_module_names)


@pytest.mark.parametrize("targets", [["q_proj", "w1"], "all-linear"], ids=str)
def test_experts_take_adapters_under_the_names_they_have(targets: Any, tmp_path: Path) -> None:
    """PEFT would look for stacks of float experts."""
    zoo = pytest.importorskip("quantmill_transformers.testing")
    if "hqq-4" not in default_host().presets:
        pytest.skip("no installed plugin has hqq-4")
    folder = zoo.write("mixtral", tmp_path / "model")
    arguments = {"source": folder, "quantization_config": "hqq-4"}
    ids = torch.randint(0, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    base = load(arguments, training=True)
    model = peft.get_peft_model(base, lora_on(targets, init_lora_weights=False))
    experts = [name for name in model.targeted_module_names if ".experts." in name]
    assert len(experts) == (24 if targets == "all-linear" else 8)
    reached = [name for name, grad in gradients(model, ids).items() if grad.any()]
    assert any(".experts." in name for name in reached)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(arguments), tmp_path / "adapter")
    assert torch.equal(answer(again.eval(), ids), answer(model.eval(), ids))


# -- merging ---------------------------------------------------------------------------------------


def answer(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("method", ["hqq-4", "fp8-block", "quanto-int8"])
def test_merging_quantizes_anew_and_unmerging_is_exact(
    method: str, source: Any, batch: Tensor, tmp_path: Path
) -> None:
    model = adapted(load(source(method)), scale=0.1).eval()
    before, ids = answer(model, batch), batch
    with model.disable_adapter():
        base = answer(model, ids)
    assert off(base, before) > 0.01, "the adapter does something"
    stored = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    model.merge_adapter()
    merged = answer(model, ids)
    assert off(merged, before) < off(base, before)
    model.unmerge_adapter()
    assert torch.equal(answer(model, ids), before)
    again = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    # For good: a model of the method without a trace of PEFT, which saves and loads.
    whole = model.merge_and_unload()
    assert torch.equal(answer(whole, ids), merged)
    whole.save_pretrained(tmp_path / "merged")
    assert torch.equal(answer(load({"source": tmp_path / "merged"}), ids), merged)


def test_two_adapters_are_merged_from_the_same_weight(source: Any, batch: Tensor) -> None:
    model = adapted(load(source("hqq-4")))
    model.add_adapter("second", lora(init_lora_weights=False))
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    one_by_one = answer(model, batch)
    model.unmerge_adapter()
    model.merge_adapter(["default", "second"])
    assert torch.equal(answer(model, batch), one_by_one)


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8"])
def test_bitsandbytes_merges_by_pefts_own_way(method: str, source: Any, batch: Tensor) -> None:
    model = adapted(load(source(method))).eval()
    before = answer(model, batch)
    model.merge_adapter()
    assert off(answer(model, batch), before) < 0.25


def refused(call: Callable[[], Any]) -> set[str]:
    with pytest.raises(QuantmillError) as caught:
        call()
    assert all(item.cause and item.fix and item.where for item in caught.value.findings)
    return {item.code for item in caught.value.findings}


def test_calibrated_methods_do_not_merge_and_say_what_to_do(source: Any, batch: Tensor) -> None:
    model = adapted(load(source("gptq-4"))).eval()
    before = answer(model, batch)
    assert refused(model.merge_adapter) == {"QM-TF-032"}
    assert torch.equal(answer(model, batch), before), "nothing has changed"
    # The advice: the same adapter on the float model.
    merged = adapted(load(source("gptq-4")).dequantize()).merge_and_unload()
    assert off(answer(merged, batch), before) < 0.02


def test_a_broken_adapter_is_not_merged(source: Any) -> None:
    model = adapted(load(source("hqq-4")))
    layer = next(part for part in model.modules() if type(part).__name__ == "LoraLinear")
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    assert refused(model.merge_adapter) == {"QM-TF-033"}


# -- what is refused -------------------------------------------------------------------------------


def test_an_adapter_on_a_method_that_is_not_trainable_is_an_error() -> None:
    pytest.importorskip("quantmill_hqq")
    host = Host()
    method = host.methods["hqq"]
    frozen = dataclasses.replace(
        method,
        name="frozen",
        aliases=(),
        presets=(),
        quant_methods=("frozen",),
        capabilities=dataclasses.replace(method.capabilities, trainable=False),
    )
    plugin: Any = types.ModuleType("frozen")
    plugin.QUANTMILL_API = 1

    def quantmill_methods() -> list[Any]:
        return [frozen]

    plugin.quantmill_methods = hookimpl(quantmill_methods)
    assert host.add(plugin, "frozen").status.value == "ok"
    with qt.activated(host=host):
        model = load({"source": TINY, "quantization_config": {"method": "frozen"}})
        assert refused(lambda: peft.get_peft_model(model, lora())) == {"QM-TF-030"}
        assert not model.hf_quantizer.is_trainable


def test_variants_that_need_a_float_weight_are_refused(source: Any) -> None:
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        base = load(source("hqq-4"))
        config = lora(**options)
        assert refused(lambda base=base, config=config: peft.get_peft_model(base, config)) == {
            "QM-TF-031"
        }
    assert _kinds(peft.get_peft_model(load(source("hqq-4")), lora(use_rslora=True)))


# -- ways to get there -----------------------------------------------------------------------------


def test_without_an_activation_a_config_brings_the_class(source: Any, batch: Tensor) -> None:
    from quantmill_transformers.lora import lora_config

    active = adapted(load(source("hqq-4")))
    base = load(source("hqq-4"))
    qt.deactivate()
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(load_alone("hqq-4"), lora())
    torch.manual_seed(0)
    model = peft.get_peft_model(base, lora_config(lora()))
    assert set(_kinds(model)) == {"LoraLinear"}
    model.load_state_dict(active.state_dict(), strict=False)
    assert torch.equal(answer(model, batch), answer(active, batch))


def load_alone(method: str) -> Any:
    return quantmill.load(TINY, method, dtype="float32")


def test_peft_is_given_back(source: Any) -> None:
    from peft.tuners.lora.model import LoraModel

    from quantmill_transformers.activation import PEFT_SYMBOL

    active = qt.active()
    assert active is not None and PEFT_SYMBOL in active.symbols
    there = LoraModel.__dict__["_create_new_module"]
    qt.deactivate()
    assert LoraModel.__dict__["_create_new_module"] is not there
    assert "quantmill" not in LoraModel._create_new_module.__module__
    float_model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    with qt.activated("*"):
        assert set(_kinds(peft.get_peft_model(float_model, lora()))) == {"Linear"}


def test_an_adapter_folder_loads_on_its_quantized_base(
    source: Any, batch: Tensor, tmp_path: Path
) -> None:
    arguments = source("gptq-4")
    model = adapted(load(arguments)).eval()
    model.save_pretrained(tmp_path / "adapter")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="float32")
    assert hasattr(found, "quantmill_job") and found.active_adapters() == ["default"]
    assert off(answer(found, batch), answer(model, batch)) < 1e-3


def test_transformers_own_adapter_methods_work(source: Any, batch: Tensor) -> None:
    model = load(source("hqq-4"))
    before = answer(model, batch)
    model.add_adapter(lora())
    assert set(_kinds(model)) == {"LoraLinear"}
    assert torch.equal(answer(model, batch), before)


def test_trainer_trains_an_adapter_and_refuses_without_one(
    source: Any, batch: Tensor, tmp_path: Path
) -> None:
    rows = [{"input_ids": row, "labels": row} for row in batch]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=load(source("hqq-4")), args=options, train_dataset=rows)
    model = peft.get_peft_model(load(source("hqq-4"), training=True), lora())
    trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0], losses


def test_adapters_train_above_offloaded_weights(source: Any, batch: Tensor, tmp_path: Path) -> None:
    split = {"": "cpu", "model.layers.1": "disk"}
    arguments = {**source("hqq-4"), "device_map": split, "offload_folder": str(tmp_path / "off")}
    model = adapted(load(arguments))
    whole = adapted(load(source("hqq-4")))
    whole.base_model.model.enable_input_require_grads()
    model.base_model.model.enable_input_require_grads()
    found, wanted = gradients(model, batch), gradients(whole, batch)
    assert max(off(found[name], grad) for name, grad in wanted.items()) < 1e-3
    assert refused(model.merge_adapter) == {"QM-TF-032"}
