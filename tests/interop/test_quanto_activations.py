"""Linears with quantized activations compute what optimum-quanto's compute, code for code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantmill
from quantmill.host import default_host
from quantmill.testing import write_tiny_llama

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
pytest.importorskip("quantmill_transformers")
quanto = pytest.importorskip("optimum.quanto")


@pytest.fixture(autouse=True)
def _needs_the_plugin() -> None:
    if "quanto" not in default_host().methods:
        pytest.skip("no installed plugin has quanto")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    # Rows of more than 128 columns: groups, which the library gives to a kernel of its own.
    return write_tiny_llama(tmp_path / "float", hidden=128, inner=384)


IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))


def plain(value: Any) -> Tensor:
    found: Tensor = value.dequantize() if isinstance(value, quanto.QTensor) else value
    return found


def library(source: Path, weights: str, activations: str) -> Path:
    """A checkpoint that optimum-quanto quantized, calibrated and saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    quanto.quantize(model, weights=weights, activations=activations, exclude="lm_head")
    with torch.no_grad(), quanto.Calibration():
        for row in IDS:
            model(input_ids=row.unsqueeze(0))
    quanto.freeze(model)
    out = source.parent / "library"
    quanto.QuantizedModelForCausalLM(model).save_pretrained(out)
    return out


def observed(peer: Any) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Inputs and outputs of the library's linears, and its logits."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def take(module: Any, args: Any, output: Any) -> None:
            seen[name] = (plain(args[0]), plain(output))

        return take

    for name, module in peer.named_modules():
        if isinstance(module, quanto.QLinear):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        logits = plain(peer(input_ids=IDS).logits).float()
    return seen, logits


@pytest.mark.parametrize("activations", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
@pytest.mark.parametrize("weights", ["qint8", "qfloat8_e4m3fn", "qint4", "qint2"])
def test_outputs_have_the_librarys_codes(source: Path, weights: str, activations: str) -> None:
    out = library(source, weights, activations)
    peer = quanto.QuantizedModelForCausalLM.from_pretrained(str(out))
    seen, theirs = observed(peer._wrapped)
    model: Any = quantmill.load(out)
    assert len(seen) == 14
    with torch.no_grad():
        for name, (x, wanted) in seen.items():
            other = model.get_submodule(name)(x) != wanted
            # A sum on the border of two codes may fall to either side.
            assert other.float().mean() < 2e-3, name
        ours = model(input_ids=IDS).logits.float()
    off = (ours - theirs).norm() / theirs.norm()
    # Rotary embeddings negate int8 codes there, and -(-128) is -128.
    assert off < (0.1 if activations == "qint8" else 0.02)


def test_the_library_negates_the_lowest_code_wrongly() -> None:
    """Why logits with int8 activations differ where a code saturates."""
    lowest = quanto.quantize_activation(torch.tensor([-200.0]), quanto.qint8, torch.tensor(1.0))
    assert plain(lowest).item() == -128
    assert plain(torch.neg(lowest)).item() == -128


def test_the_library_reads_what_was_calibrated_here(source: Path) -> None:
    out = source.parent / "out"
    save_file({"input_ids": IDS}, source.parent / "ids.safetensors")
    options: dict[str, Any] = {"calibration": source.parent / "ids.safetensors", "length": 24}
    quantmill.quantize(source, out, "quanto-int8-a8", **options)
    peer = quanto.QuantizedModelForCausalLM.from_pretrained(str(out))
    mine: Any = quantmill.load(out)
    floats: Any = quantmill.load(source)
    with torch.no_grad():
        theirs, ours, wanted = (
            plain(item(input_ids=IDS).logits).float() for item in (peer, mine, floats)
        )
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert (ours - wanted).norm() <= 1.1 * (theirs - wanted).norm()
