"""Mixtures of experts: every matrix quantized, named as in files, computed with when routed to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantmill
from quantmill.experts import LinearExperts
from quantmill_transformers.testing import make, sample, write

pytest.importorskip("quantmill_bnb")
Small = Callable[[str], Path]
NAMES = ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3", "gpt-oss"]
# Where gradients are asked for, it computes as told.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
FIRST = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.0.w1.weight.absmax",
    "deepseek-v3": "model.layers.1.mlp.experts.0.gate_proj.weight.absmax",
}


def logits(name: str, model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**sample(name, model)).logits
    return found


def experts_of(model: Any) -> Any:
    return model.model.layers[1].mlp.experts


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_shows_every_expert(name: str, small: Small) -> None:
    plan = quantmill.plan(small(name), "bnb-nf4")
    assert not plan.findings.errors and "QM-TARGET-014" not in {i.code for i in plan.findings}
    found = [item for item in plan.modules if ".experts." in item.name and ".1." in item.name]
    assert {item.action for item in found} == {"quantize"}
    stacks: Any = experts_of(make(name))
    wanted = sum(tensor.numel() for tensor in stacks.parameters() if tensor.ndim == 3)
    layer = [item for item in found if item.name.startswith("model.layers.1.")]
    assert sum(item.parameters for item in layer) == wanted and len(layer) == 12


@pytest.mark.parametrize("name", NAMES)
def test_quantized_experts_compute_what_their_weights_say(name: str, small: Small) -> None:
    ours = quantmill.load(small(name), "bnb-nf4")
    experts = experts_of(ours)
    assert isinstance(experts, LinearExperts) and not any(
        tensor.ndim == 3 for tensor in experts.parameters()
    )
    found = logits(name, ours)
    again = quantmill.dequantize(ours)
    stacked = experts_of(again)
    assert type(stacked) is type(experts_of(make(name)))
    float_ones = logits(name, again)
    # The library's kernel for CPUs computes in bfloat16.
    assert (found - float_ones).norm() < 0.02 * float_ones.norm()
    float_one: Any = make(name)
    shapes = {key: tensor.shape for key, tensor in float_one.state_dict().items()}
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == shapes


@pytest.mark.parametrize("name", NAMES)
def test_written_experts_have_names_of_their_own(name: str, small: Small, tmp_path: Path) -> None:
    ours: Any = quantmill.load(small(name), "bnb-nf4")
    quantmill.quantize(small(name), tmp_path / "out", "bnb-nf4")
    ours.save_pretrained(tmp_path / "saved")
    written, saved = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "saved"))
    first = "model.layers.1.mlp.experts.0.gate_proj.weight.absmax"
    assert FIRST.get(name, first) in written and set(written) == set(saved)
    for folder in ("out", "saved"):
        assert torch.equal(logits(name, quantmill.load(tmp_path / folder)), logits(name, ours))
    plain = quantmill.load(tmp_path / "out", dequantize=True)
    assert torch.equal(logits(name, plain), logits(name, quantmill.dequantize(ours)))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_are_read_from_a_stack_too(name: str, tmp_path: Path) -> None:
    """Version 5 can save stacks as they are; of each, only the expert at hand is read."""
    folder = write(name, tmp_path / "new", save={"save_original_format": False})
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(folder / "model.safetensors")
    apart = write(name, tmp_path / "old")
    one, two = (quantmill.load(path, "bnb-nf4") for path in (folder, apart))
    assert torch.equal(logits(name, one), logits(name, two))
    skip = "re:.*layers\\.1\\..*experts\\.[02]\\.(up_proj|w3)"
    quantmill.quantize(folder, tmp_path / "out", "bnb-nf4", skip=[skip])
    mixed = quantmill.load(folder, "bnb-nf4", skip=[skip])
    kept = [part for key, part in mixed.named_modules() if type(part) is nn.Linear]
    assert len(kept) == 3
    assert torch.equal(logits(name, quantmill.load(tmp_path / "out")), logits(name, mixed))


def test_one_layer_of_experts_may_stay_stacked(small: Small, tmp_path: Path) -> None:
    skip = ["layers:0 & role:expert"]
    ours: Any = quantmill.load(small("mixtral"), "bnb-nf4", skip=skip)
    first, second = (layer.mlp.experts for layer in ours.model.layers)
    assert not isinstance(first, LinearExperts) and isinstance(second, LinearExperts)
    ours.save_pretrained(tmp_path / "saved")
    quantmill.quantize(small("mixtral"), tmp_path / "out", "bnb-nf4", skip=skip)
    for folder in ("saved", "out"):
        again = quantmill.load(tmp_path / folder)
        assert torch.equal(logits("mixtral", again), logits("mixtral", ours)), folder


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_only_routed_experts_compute(name: str, small: Small) -> None:
    ours = quantmill.load(small(name), "bnb-nf4")
    experts, called = experts_of(ours), []
    for index in range(4):
        for part in experts.get_submodule(str(index)).children():
            part.register_forward_pre_hook(lambda _, __, index=index: called.append(index))
    state = torch.randn(3, 64)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2]])
    experts(state, chosen, torch.full((3, 2), 0.5))
    assert set(called) == {0, 2} and len(called) == 6
    nobody = experts(state, torch.full((3, 2), 4), torch.zeros(3, 2))
    assert len(called) == 6 and torch.equal(nobody, torch.zeros_like(state))


def test_gradients_reach_what_lies_before_the_experts(small: Small) -> None:
    ours: Any = quantmill.load(small("mixtral"), NF4, training=True)
    again: Any = quantmill.dequantize(quantmill.load(small("mixtral"), NF4))
    found = []
    for model in (ours, again):
        state = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        chosen = torch.tensor([[0, 1], [1, 2], [3, 0], [0, 1], [2, 3]])
        experts_of(model)(state, chosen, torch.full((5, 2), 0.5)).square().sum().backward()
        found.append(state.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_bytes_beyond_the_experts_file_are_named(tmp_path: Path, small: Small) -> None:
    quantmill.quantize(small("mixtral"), tmp_path / "out", "bnb-nf4")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight.absmax"
    save_file({k: v for k, v in tensors.items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(quantmill.QuantmillError) as caught:
        quantmill.load(tmp_path / "out")
    assert any("experts.3.w2" in item.where for item in caught.value.findings)


# -- all at once -----------------------------------------------------------------------------------


def in_turn(name: str, model: Any) -> Tensor:
    """Logits of the reference: a call for each expert."""
    experts = [part for part in model.modules() if isinstance(part, LinearExperts)]
    banks = [part._banks for part in experts]
    for part in experts:
        part._banks = ()
    found = logits(name, model)
    for part, kept in zip(experts, banks, strict=True):
        part._banks = kept
    return found


@pytest.mark.parametrize("name", NAMES)
def test_one_product_for_all_experts_is_that_of_each(name: str, small: Small) -> None:
    pytest.importorskip("quantmill_cpu")
    model = quantmill.load(small(name), "bnb-nf4", dtype="bfloat16")
    experts = experts_of(model)
    assert len(experts._banks) == 3
    found = logits(name, model)
    assert torch.equal(found, in_turn(name, model))
    assert torch.equal(logits(name, copy.deepcopy(model)), found)
    # Moving makes new tensors, and a new bank of them.
    before = experts._banks
    experts.to(torch.bfloat16)
    assert len(experts._banks) == 3 and experts._banks[0] is not before[0]
    assert torch.equal(logits(name, model), found)
    again = logits(name, quantmill.dequantize(model))
    assert (found - again).norm() < 0.06 * again.norm()


def test_what_somebody_puts_at_an_expert_is_called(small: Small) -> None:
    pytest.importorskip("quantmill_cpu")
    model = quantmill.load(small("mixtral"), "bnb-nf4", dtype="bfloat16")
    experts: Any = experts_of(model)
    state = torch.randn(7, 64, dtype=torch.bfloat16)
    chosen = torch.tensor([[0, 1]] * 7)
    weights = torch.full((7, 2), 0.5, dtype=torch.bfloat16)
    with torch.inference_mode():
        before = experts(state, chosen, weights)
        linear = experts.get_submodule("1.w2")
        handle = linear.register_forward_hook(lambda _, __, output: output * 0)
        without = experts(state, chosen, weights)
        handle.remove()
        assert torch.equal(experts(state, chosen, weights), before)
        experts.set_submodule("1.w2", nn.Linear(128, 64, bias=False).to(torch.bfloat16))
        other = experts(state, chosen, weights)
    assert not torch.equal(without, before) and not torch.equal(other, before)


def test_experts_compile_whole(small: Small) -> None:
    pytest.importorskip("quantmill_cpu")
    experts: Any = experts_of(quantmill.load(small("gpt-oss"), "bnb-nf4", dtype="bfloat16"))
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for tokens in (5, 9):
            state = torch.randn(tokens, 64, dtype=torch.bfloat16)
            chosen = torch.randint(0, 4, (tokens, 2))
            weights = torch.rand(tokens, 2, dtype=torch.bfloat16)
            found, wanted = compiled(state, chosen, weights), experts(state, chosen, weights)
            assert torch.allclose(found, wanted, rtol=0.02, atol=0.02)
