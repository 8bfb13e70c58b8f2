"""Quantized activations: calibrated, stored, computed with, refused when damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantmill
from quantmill.findings import QuantmillError
from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target, write_tiny_llama
from quantmill_quanto.codec import QuantoCodec
from quantmill_quanto.config import QuantoConfig
from quantmill_quanto.forms import joined, parted
from quantmill_quanto.linear import QLinear
from quantmill_quanto.quantizer import QuantoQuantizer


def made(kind: str = "int8", weights: str = "int8") -> tuple[Any, Any]:
    config = QuantoConfig(weights=weights, activations=kind)  # type: ignore[arg-type]
    quantizer = QuantoQuantizer(config, device=torch.device("cpu"), kernels=KernelRegistry([]))
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    form: Any = quantizer.quantize(make_target(12, 64), MatrixSource(weight))
    scales = (torch.tensor(0.03), torch.tensor(0.2))
    return QuantoCodec(config), joined(form, scales)


@pytest.mark.parametrize("kind", ["int8", "float8", "float8_e5m2"])
@pytest.mark.parametrize("weights", ["int8", "int4", "float8", "float8_e4m3fnuz"])
def test_inputs_and_outputs_are_rounded_by_their_scales(kind: str, weights: str) -> None:
    codec, form = made(kind, weights)

    def rounded(x: Tensor, scale: float) -> Tensor:
        if kind == "int8":
            return torch.round(x / scale).clamp(-128, 127) * scale
        narrow = torch.float8_e5m2 if kind == "float8_e5m2" else torch.float8_e4m3fn
        top = torch.finfo(narrow).max
        return (x / scale).clamp(-top, top).to(narrow).float() * scale

    bias = torch.randn(12)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    plain = nn.functional.linear(rounded(x, 0.03), form.dequantize(torch.float32), bias)
    module = QLinear(form, bias, codec, KernelRegistry([]), "float32")
    assert (module(x) - rounded(plain, 0.2)).abs().max() <= 0.2001
    assert (module(x) - rounded(plain, 0.2)).norm() < 0.05 * plain.norm()
    stored = codec.encode(module.form)
    again = codec.decode(stored, make_target(12, 64), torch.float32)
    assert [float(item) for item in parted(again)[1]] == pytest.approx([0.03, 0.2])


BROKEN: dict[str, Any] = {
    "zero": lambda t: t * 0,
    "negative": lambda t: -t,
    "NaN": lambda t: t * float("nan"),
    "infinite": lambda t: t / 0,
    "two": lambda t: torch.stack([t, t]),
    "missing": lambda t: None,
}


@pytest.mark.parametrize("what", sorted(BROKEN))
@pytest.mark.parametrize("name", ["input_scale", "output_scale"])
def test_damage_is_named(name: str, what: str) -> None:
    codec, form = made()
    stored = codec.encode(form)
    changed = BROKEN[what](stored.pop(name))
    if changed is not None:
        stored[name] = changed
    with pytest.raises(QuantmillError) as caught:
        codec.decode(stored, make_target(12, 64), torch.float32)
    (found,) = caught.value.findings
    assert found.code == "QM-QUANTO-001" and found.where == "layer" and name in found.cause


def test_a_calibrated_checkpoint_is_near_the_float_model(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float")
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    options: dict[str, Any] = {"calibration": tmp_path / "ids.safetensors", "length": 32}
    quantmill.quantize(source, tmp_path / "out", "quanto-int8-a8", **options)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scales = [float(t) for n, t in stored.items() if n.endswith(("input_scale", "output_scale"))]
    assert len(scales) == 28 and all(0 < scale < 1 for scale in scales)
    table = (tmp_path / "out" / "quanto_qmap.json").read_text()
    assert '"activations": "qint8"' in table
    floats: Any = quantmill.load(source)
    model: Any = quantmill.load(tmp_path / "out")
    with torch.inference_mode():
        wanted, found = floats(input_ids=ids).logits, model(input_ids=ids).logits
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
