"""Block types: decoding and quantizing to ggml's bits, forms of the core, exact ways back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantmill.findings import QuantmillError
from quantmill.forms import Affine, Codebook, Group
from quantmill_gguf.byteorder import swapped
from quantmill_gguf.codec import type_of
from quantmill_gguf.types import TYPES
from quantmill_gguf.types.sizes import BY_NAME, PLAIN

DATA = Path(__file__).parent / "data"
BLOCKS: Any = np.load(DATA / "golden_blocks.npz")
GOLDEN = [name for name in TYPES if f"{name}__bytes" in BLOCKS]
FORMS = [name for name in TYPES if name not in PLAIN]


def random_bytes(name: str, blocks: int, seed: int = 0) -> Tensor:
    """Every byte pattern: scales are NaN and infinite too. Two blocks make a row."""
    generator = torch.Generator().manual_seed(seed)
    size = (blocks // 2, 2 * BY_NAME[name].size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, but for the payload of NaN."""
    bits = ours.view(torch.int32) == theirs.view(torch.int32)
    return ours.dtype == theirs.dtype and bool((bits | (ours.isnan() & theirs.isnan())).all())


def test_the_golden_blocks_cover_every_block_type() -> None:
    assert set(GOLDEN) == set(FORMS)


@pytest.mark.parametrize("name", GOLDEN)
def test_decoding_is_that_of_ggml(name: str) -> None:
    raw = torch.from_numpy(BLOCKS[f"{name}__bytes"])
    assert same(TYPES[name].decode(raw), torch.from_numpy(BLOCKS[f"{name}__f32"]))


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("Q8_K", "Q2_0", "Q1_0")])
def test_decoding_is_that_of_gguf_py(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw = random_bytes(name, 4096)
    if name in PLAIN and name not in ("F32", "F16", "BF16"):
        pytest.skip("gguf-py has no decoder")
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name])
    assert same(TYPES[name].decode(raw), torch.from_numpy(np.ascontiguousarray(theirs)))


@pytest.mark.parametrize("name", FORMS)
def test_forms_stand_for_the_same_numbers_and_give_the_bytes_back(name: str) -> None:
    kind, raw = TYPES[name], random_bytes(name, 512, 1)
    form = kind.form(raw, torch.bfloat16)
    assert same(form.dequantize(torch.float32), kind.decode(raw))
    assert torch.equal(kind.raw(form), raw)
    assert form.dtype == torch.bfloat16 and type_of(form) == name
    meta = kind.form(raw.to("meta"))
    assert meta.nbytes == form.nbytes and meta.traits() == form.traits()
    assert kind.raw(meta).shape == raw.shape


def test_what_kernels_know_is_a_form_of_the_core() -> None:
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        assert isinstance(TYPES[name].form(random_bytes(name, 2)), Affine)
    for name in ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"):
        assert isinstance(TYPES[name].form(random_bytes(name, 2)), Codebook)


def test_a_form_of_another_kind_has_no_type() -> None:
    odd = Affine.quantize(torch.randn(4, 32), 3, Group(32))
    with pytest.raises(QuantmillError, match="QM-GGUF-030"):
        type_of(odd)
    with pytest.raises(TypeError):
        TYPES["Q8_K"].raw(odd)


@pytest.mark.parametrize("name", TYPES)
def test_byte_order_concerns_numbers_of_several_bytes_alone(name: str) -> None:
    raw = random_bytes(name, 8)
    other = swapped(raw, BY_NAME[name])
    assert torch.equal(swapped(other, BY_NAME[name]), raw)
    if name in PLAIN and BY_NAME[name].size > 1:
        width = BY_NAME[name].size
        assert torch.equal(other, raw.view(-1, width).flip(1).view(raw.shape))
    info = BY_NAME[name]
    changed = (other != raw).view(-1, info.size).any(dim=0).nonzero().flatten().tolist()
    assert set(changed) <= {start + i for start, width in info.words for i in range(width)}
