"""Quantizing: the bytes of ggml's quantizers, with and without importance, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantmill.findings import QuantmillError
from quantmill.kernels import KernelRegistry
from quantmill_gguf.encode import MADE, decode, encode
from quantmill_gguf.types import TYPES
from quantmill_gguf.types.search import square_root
from quantmill_gguf.types.sizes import PLAIN

DATA = Path(__file__).parent / "data"
GOLDEN: Any = np.load(DATA / "golden_encode.npz")
VALUES, IMPORTANCE = torch.from_numpy(GOLDEN["x"]), torch.from_numpy(GOLDEN["imatrix"])
BLOCKS = [name for name in MADE if name not in PLAIN]
WEIGHED = [name for name in BLOCKS if TYPES[name].weighs]
REFERENCE = KernelRegistry([], environment=False)
"""No kernels: the definitions in torch."""


def golden(name: str, suffix: str = "") -> Tensor:
    return torch.from_numpy(GOLDEN[f"{name}__bytes{suffix}"])


@pytest.mark.parametrize("name", [*BLOCKS, "F16", "BF16"])
def test_quantizing_gives_the_bytes_of_ggml(name: str) -> None:
    assert torch.equal(encode(name, VALUES, kernels=REFERENCE), golden(name))


@pytest.mark.parametrize("name", WEIGHED)
def test_importance_gives_the_bytes_of_ggml(name: str) -> None:
    made = encode(name, VALUES, IMPORTANCE, kernels=REFERENCE)
    assert torch.equal(made, golden(name, "_imatrix"))
    assert not torch.equal(made, golden(name))


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - set(WEIGHED)))
def test_types_without_a_choice_do_not_look_at_importance(name: str) -> None:
    assert torch.equal(encode(name, VALUES, IMPORTANCE, kernels=REFERENCE), golden(name))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_quantizing_gives_the_bytes_of_gguf_py(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    values[0] = 0
    values[1] = values[1].round()  # ties of magnitude, with both signs
    values[2] *= 1e4
    values[3] *= 1e-4
    theirs = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[name])
    made = encode(name, values, kernels=REFERENCE)
    assert torch.equal(made, torch.from_numpy(theirs.view(np.uint8)))


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "IQ4_XS", "Q5_1"])
def test_importance_lowers_the_error_where_it_counts(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(32, 512, generator=generator)
    importance = torch.rand(512, generator=generator) ** 8
    plain, weighed = (
        (decode(name, encode(name, values, weight, kernels=REFERENCE)) - values).square()
        @ importance
        for weight in (None, importance)
    )
    assert float(weighed.sum()) < 0.95 * float(plain.sum())


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q3_K", "IQ4_NL", "MXFP4"])
def test_pieces_and_shapes_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = VALUES.to(torch.bfloat16).reshape(2, 4, 512)
    whole = encode(name, values, IMPORTANCE, kernels=REFERENCE)
    monkeypatch.setattr("quantmill_gguf.types.base._PIECE", 600)
    parts = encode(name, values.float(), IMPORTANCE, kernels=REFERENCE)
    assert torch.equal(whole, parts) and whole.shape[:2] == (2, 4)
    assert decode(name, whole).shape == values.shape
    none = encode(name, torch.empty(0, 512), kernels=REFERENCE)
    assert none.shape == (0, whole.shape[-1]) and decode(name, none).shape == (0, 512)


def refused(number: str, *arguments: Any) -> None:
    with pytest.raises(QuantmillError, match=f"QM-GGUF-{number}"):
        encode(*arguments, kernels=REFERENCE)


def test_what_can_not_be_quantized_is_named() -> None:
    refused("009", "IQ2_XXS", VALUES)
    refused("009", "q4", VALUES)
    refused("030", "Q4_K", torch.zeros(1, 32))
    for value in (float("nan"), float("inf")):
        refused("032", "Q8_0", torch.full((2, 32), value))
    for name in ("Q4_0", "Q4_1", "Q8_0", "TQ2_0", "IQ4_XS", "Q2_K", "Q6_K"):
        refused("032", name, torch.ones(1, 256) * 1e9)
    for bad in (torch.ones(31), -torch.ones(32), torch.full((32,), float("nan"))):
        refused("033", "Q4_0", torch.zeros(1, 32), bad)


def test_square_roots_are_rounded_correctly() -> None:
    values = torch.rand(10000, generator=torch.Generator().manual_seed(0))
    assert square_root(values).tolist() == np.sqrt(values.numpy()).tolist()
