"""BitNet checkpoints: made by hand, read, damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill.kernels import KernelRegistry
from quantmill.testing import make_target, write_tiny_llama
from quantmill_quanto.bitnet import BitLinear, BitnetCodec, BitnetConfig


def packed(weight: Tensor) -> Tensor:
    """Ternary ``[out, in]`` as bytes, row by row as the format says."""
    rows, columns = weight.shape
    quarter = rows // 4
    out = torch.zeros(quarter, columns, dtype=torch.uint8)
    for row in range(rows):
        out[row % quarter] |= (weight[row] + 1).to(torch.uint8) << 2 * (row // quarter)
    return out


def fabricate(source: Path, folder: Path, kind: str) -> dict[str, Tensor]:
    """Turn the projections of a float checkpoint into ternary ones; the weights they mean."""
    folder.mkdir()
    tensors, weights = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().mean()
        ternary = torch.round(tensor.float() / scale).clamp(-1, 1)
        stored = scale if kind == "autobitlinear" else 1 / scale
        stored = stored.reshape(1).to(torch.bfloat16)
        means = stored.float() if kind == "autobitlinear" else 1 / stored.float()
        weights[name] = ternary * means
        tensors[name] = packed(ternary)
        tensors[f"{name}_scale"] = stored
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": kind,
        "quantization_mode": "offline",
        "modules_to_not_convert": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_a_checkpoint_has_the_weights_it_means(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float")
    weights = fabricate(source, tmp_path / "ternary", kind)
    floats: Any = quantmill.load(tmp_path / "ternary", dequantize=True, dtype="float32")
    for name, wanted in weights.items():
        assert torch.equal(floats.get_parameter(name), wanted), name
    model: Any = quantmill.load(tmp_path / "ternary")
    stored, state = load_file(tmp_path / "ternary" / "model.safetensors"), model.state_dict()
    assert set(state) == set(stored)
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    plan = quantmill.plan(tmp_path / "ternary")
    assert not plan.findings.errors and any("2-bit" in item.form for item in plan.modules)


def made(
    kind: str = "bitlinear", rows: int = 8, columns: int = 16
) -> tuple[Any, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ternary = torch.randint(-1, 2, (rows, columns), generator=generator)
    stored = {"weight": packed(ternary), "weight_scale": torch.tensor([4.0])}
    return BitnetCodec(BitnetConfig(linear_class=kind)), stored  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_a_linear_computes_what_transformers_does(kind: str) -> None:
    codec, stored = made(kind)
    form = codec.decode(stored, make_target(8, 16), torch.float32)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    module = BitLinear(form, None, codec, KernelRegistry([]), "float32")
    scale = 127 / x.abs().amax(dim=-1, keepdim=True)
    whole = (x * scale).round().clamp(-128, 127)
    ternary = form.codes.unpack().float() - 1
    factor = 4.0 if kind == "autobitlinear" else 0.25
    wanted = nn.functional.linear(whole, ternary) / scale * factor
    assert torch.allclose(module(x), wanted, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), wanted, rtol=1e-5, atol=1e-6)
    again = codec.encode(module.form)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


BROKEN: dict[str, tuple[str, Any]] = {
    "a code of 3": ("weight", lambda t: t | 3),
    "rows cut": ("weight", lambda t: t[:-1]),
    "no scale": ("weight_scale", lambda t: None),
    "a scale of zero": ("weight_scale", lambda t: t * 0),
    "a scale of NaN": ("weight_scale", lambda t: t * float("nan")),
    "a negative scale": ("weight_scale", lambda t: -t),
    "two scales": ("weight_scale", lambda t: torch.cat([t, t])),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_damage_is_named(what: str) -> None:
    name, change = BROKEN[what]
    codec, stored = made()
    changed = change(stored.pop(name))
    if changed is not None:
        stored[name] = changed
    with pytest.raises(QuantmillError) as caught:
        codec.decode(stored, make_target(8, 16), torch.bfloat16)
    (found,) = caught.value.findings
    assert found.code == "QM-QUANTO-020" and found.where == "layer" and found.fix


def test_what_is_not_computed_is_refused() -> None:
    for field, value in (("quantization_mode", "online"), ("use_rms_norm", True)):
        with pytest.raises(FindingsError) as caught:
            BitnetConfig.from_checkpoint({"quant_method": "bitnet", field: value})
        assert caught.value.findings[0].where == field


def test_it_is_read_and_not_made(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "float")
    with pytest.raises(FindingsError) as caught:
        quantmill.quantize(source, tmp_path / "out", "bitnet")
    assert "QM-METHOD-008" in {item.code for item in caught.value.findings}
    assert not (tmp_path / "out").exists()
