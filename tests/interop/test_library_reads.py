"""What we write, the library that owns the format reads, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantmill
from quantmill.testing import write_tiny_llama

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "float")


def ours(folder: Path) -> dict[str, Tensor]:
    """The float weights of the projections, by module."""
    model: Any = quantmill.load(folder, dequantize=True)
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in model.state_dict().items()
        if name.endswith("_proj.weight")
    }


def near(theirs: Tensor, wanted: Tensor, steps: float = 0.0) -> bool:
    """Equal, or within some steps of bfloat16 where the library rounds between its operations."""
    far = (theirs.float() - wanted.float()).abs().max()
    return bool(far <= steps * 2**-8 * wanted.float().abs().max())


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("torchao-int8wo", 0),
        ("torchao-int8da-int8w", 0),
        ("torchao-float8wo", 0),
        ("torchao-intx4wo:granularity=PerGroup(32)", 1),
        ("torchao-int8da-int4w", 1),
    ],
)
def test_torchao_through_transformers(source: Path, method: str, steps: float) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("accelerate")
    out = source.parent / "out"
    quantmill.quantize(source, out, method, max_shard_bytes=150_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, device_map="cpu"
    )
    for name, wanted in ours(out).items():
        weight = peer.get_submodule(name).weight
        assert type(weight).__name__.endswith("Tensor") and hasattr(weight, "dequantize")
        assert near(weight.dequantize(), wanted, steps), name
    with torch.inference_mode():
        assert torch.isfinite(peer(torch.arange(8).reshape(1, 8)).logits).all()


@pytest.mark.parametrize("method", ["hqq-8", "hqq-4", "hqq-3", "hqq-2", "hqq:nbits=4,axis=0"])
def test_hqq(source: Path, method: str) -> None:
    core = pytest.importorskip("hqq.core.quantize")
    out = source.parent / "out"
    quantmill.quantize(source, out, method)
    stored = load_file(out / "model.safetensors")
    for name, wanted in ours(out).items():
        state = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in stored.items()
            if key.startswith(f"{name}.")
        }
        layer = core.HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu")
        layer.load_state_dict(state)
        assert near(layer.dequantize().reshape(wanted.shape), wanted, 4), name


@pytest.mark.parametrize(
    "method",
    ["quanto-int8", "quanto-float8", "quanto:weights=float8_e5m2", "quanto-int4", "quanto-int2"],
)
def test_quanto(tmp_path: Path, method: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    # Groups of 128 need rows of more than that.
    source = write_tiny_llama(tmp_path / "float", hidden=256, inner=384)
    out = tmp_path / "out"
    quantmill.quantize(source, out, method)
    peer = quanto.QuantizedModelForCausalLM.from_pretrained(str(out))
    for name, wanted in ours(out).items():
        weight = peer.get_submodule(name).weight
        # In four bits it rounds the product and the sum; ours is rounded once.
        assert near(weight.dequantize(), wanted, 8), name


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("ct-int8", 1),
        ("ct-int4:group_size=32", 1),
        ("ct-int4-asym:group_size=32", 1),
        ("ct:num_bits=3,group_size=32", 1),
        ("ct-fp8", 1),
        ("ct-fp8:strategy=block,block_structure=[32,32]", 1),
        ("ct-nvfp4", 2),
        ("ct-mxfp4", 1),
        ("ct-mxfp8", 1),
    ],
)
def test_compressed_tensors(source: Path, method: str, steps: float) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    out = source.parent / "out"
    quantmill.quantize(source, out, method)
    raw = json.loads((out / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(raw)
    (scheme,) = config.config_groups.values()
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    stored = load_file(out / "model.safetensors")
    for name, wanted in ours(out).items():
        state = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in stored.items()
            if key.startswith(f"{name}.")
        }
        weight = compressor.decompress(state, scheme)["weight"]
        assert near(weight, wanted, steps), name


def test_asymmetric_int4_loads_packed(source: Path) -> None:
    """transformers refuses such a checkpoint unless it may dequantize it."""
    pytest.importorskip("compressed_tensors")
    out = source.parent / "out"
    quantmill.quantize(source, out, "ct-int4-asym:group_size=32")
    model: Any = quantmill.load(out)
    assert "4-bit" in next(
        item.form for item in quantmill.plan(out).modules if item.name.endswith("up_proj")
    )
    floats: Any = quantmill.load(out, dequantize=True)
    ids = torch.arange(16).reshape(2, 8)
    with torch.inference_mode():
        far = (model(input_ids=ids).logits - floats(input_ids=ids).logits).float().norm()
        assert far < 0.02 * floats(input_ids=ids).logits.float().norm()
