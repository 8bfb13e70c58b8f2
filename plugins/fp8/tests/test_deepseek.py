"""A DeepSeek-style checkpoint, made and read here by the format's definition alone.

The script knows nothing of the plugin: bytes of E4M3 are rounded and decoded by arithmetic, blocks
are cut with slices. Rows of 576 and 192 are those that peers refuse or scale wrongly.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantmill
from quantmill.testing import write_tiny_llama

BLOCK = 128
SHAPE = {"hidden": 576, "inner": 192, "heads": 3, "layers": 1, "vocab": 64}
"""Of the tiny Llama: weights of 576 and 192 rows and columns."""


def value_of(byte: int) -> float:
    """E4M3: a sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F is NaN, none is infinite."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return math.nan if byte & 0x7F == 0x7F else sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


VALUES = np.array([value_of(byte) for byte in range(256)], dtype=np.float32)
GRID = VALUES[:127].astype(np.float64)


def nearest(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bytes of the nearest E4M3 numbers, ties to even."""
    size = np.abs(values).astype(np.float64)
    upper = np.clip(np.searchsorted(GRID, size), 1, 126)
    middle = (GRID[upper - 1] + GRID[upper]) / 2
    codes = np.where((size > middle) | ((size == middle) & (upper % 2 == 0)), upper, upper - 1)
    return (codes | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def blocks(rows: int, columns: int) -> list[tuple[int, int, slice, slice]]:
    return [
        (i, j, slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
        for i in range(-(-rows // BLOCK))
        for j in range(-(-columns // BLOCK))
    ]


def encode(weight: np.ndarray[Any, Any], power: bool) -> tuple[np.ndarray[Any, Any], Any]:
    """Bytes, and what each block is to be multiplied with."""
    codes = np.zeros(weight.shape, dtype=np.uint8)
    grid = [-(-size // BLOCK) for size in weight.shape]
    scales = np.zeros(grid, dtype=np.float32)
    for i, j, rows, columns in blocks(*weight.shape):
        part = weight[rows, columns]
        scale = np.float32(np.abs(part).max() / np.float32(448))
        if power:
            scale = np.float32(2.0 ** math.ceil(math.log2(scale)))
        scales[i, j] = scale
        codes[rows, columns] = nearest(part / scale)
    return codes, scales


def decode(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = VALUES[codes].copy()
    for i, j, rows, columns in blocks(*codes.shape):
        wide[rows, columns] *= scales[i, j]
    return wide


def as_file(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], power: bool) -> list[Tensor]:
    stored = torch.from_numpy(scales)
    if power:  # V3.1 and later: the exponent's byte
        exponents = torch.log2(stored).to(torch.int16) + 127
        stored = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    return [torch.from_numpy(codes).view(torch.float8_e4m3fn), stored]


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("power", [False, True], ids=["float", "ue8m0"])
def test_a_checkpoint_by_the_definition_round_trips(tmp_path: Path, power: bool) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float", **SHAPE)
    folder = tmp_path / "deepseek"
    folder.mkdir()
    stored, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            codes, scales = encode(tensor.float().numpy(), power)
            stored[name], stored[f"{name}_scale_inv"] = as_file(codes, scales, power)
            meant[name] = torch.from_numpy(decode(codes, scales))
    assert {size for weight in meant.values() for size in weight.shape} == {192, 576}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        **({"scale_fmt": "ue8m0"} if power else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))

    model: Any = quantmill.load(folder)
    for name, weight in meant.items():
        linear: Any = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(linear.form.dequantize(torch.float32), weight), name
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(stored)
    assert all(torch.equal(raw(again[name]), raw(tensor)) for name, tensor in stored.items())
    written = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert written | config["quantization_config"] == written

    # What we make of the float model are the same bytes.
    method = "fp8-block-ue8m0" if power else "fp8-block"
    quantmill.quantize(source, tmp_path / "ours", method)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for name in meant:
        wide = decode(ours[name].view(torch.uint8).numpy(), _floats(ours[f"{name}_scale_inv"]))
        exact = load_file(source / "model.safetensors")[name].float()
        # To rounding: half a unit of three bits of mantissa, and of the smallest number.
        error = (torch.from_numpy(wide) - exact).abs()
        scale = torch.from_numpy(_spread(_floats(ours[f"{name}_scale_inv"]), wide.shape))
        assert bool((error <= exact.abs() / 16 * (1 + 1e-6) + scale * 2.0**-10).all()), name
        assert torch.equal(raw(ours[name]), raw(stored[name])), name


def _floats(scales: Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(scales.to(torch.float32))


def _spread(scales: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    wide = np.zeros(shape, dtype=np.float32)
    for i, j, rows, columns in blocks(*shape):
        wide[rows, columns] = scales[i, j]
    return wide
