"""The native codecs of ggml's types give the bytes and bits of the types' definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("quantmill_cpu")
pytest.importorskip("quantmill_gguf")

from quantmill.host import default_host
from quantmill.kernels import KernelRegistry
from quantmill_cpu import native
from quantmill_gguf.encode import MADE, decode, encode
from quantmill_gguf.types import TYPES, RawForm
from quantmill_gguf.types.coded import CodedType
from quantmill_gguf.types.sizes import PLAIN

DATA = Path(__file__).resolve().parents[2] / "plugins" / "gguf" / "tests" / "data"
BLOCKS = [name for name in TYPES if name not in PLAIN]
CODED = [name for name, kind in TYPES.items() if isinstance(kind, CodedType)]
ENCODED = [name for name in MADE if name not in PLAIN]
REFERENCE = KernelRegistry([], environment=False)


@pytest.fixture(scope="module")
def kernels() -> KernelRegistry:
    host = default_host()
    found = KernelRegistry(
        [item for item in host.kernels if item.name.startswith("cpu-")], environment=False
    )
    for operation, names in (("quantize", ENCODED), ("dequantize", BLOCKS)):
        for name in names:
            choice = found.choose(operation, "ggml", {"table": name}, device="cpu", dtype="float32")
            assert choice is not None, f"{name} has no native kernel to {operation}"
    return found


@pytest.fixture(params=native.levels(), autouse=True)
def level(request: Any) -> Any:
    native.use_level(request.param)
    yield request.param
    native.use_level(native.levels()[-1])


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, but for the payload of NaN."""
    bits = ours.view(torch.int32) == theirs.view(torch.int32)
    return bool((bits | (ours.isnan() & theirs.isnan())).all())


@pytest.mark.parametrize("name", BLOCKS)
def test_decoding(name: str, kernels: KernelRegistry) -> None:
    golden: Any = np.load(DATA / "golden_blocks.npz")
    raw = torch.from_numpy(golden[f"{name}__bytes"])
    assert same(decode(name, raw, kernels=kernels), torch.from_numpy(golden[f"{name}__f32"]))
    # Every byte pattern: scales are NaN and infinite too.
    size = (1024, 2 * TYPES[name].info.size)
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = decode(name, raw, kernels=REFERENCE)
    assert same(decode(name, raw, kernels=kernels), wanted)
    out = torch.empty_like(wanted)
    assert decode(name, raw, out, kernels=kernels) is out and same(out, wanted)


@pytest.mark.parametrize("name", CODED)
def test_codes(name: str, kernels: KernelRegistry) -> None:
    size = (300, 3 * TYPES[name].info.size)  # more than one piece of work
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    choice = kernels.choose("codes", "ggml", {"table": name}, device="cpu", dtype="float32")
    assert choice is not None
    wanted, found = RawForm(raw, name).regular(), RawForm(raw, name).regular(kernels)
    for key, tensor in wanted.tensors().items():
        there = found.tensors()[key]
        assert there.dtype == tensor.dtype and there.shape == tensor.shape
        assert torch.equal(there.view(torch.uint8), tensor.view(torch.uint8)), key


def values() -> Tensor:
    """Rows of every kind."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(40, 512, generator=generator)
    scaled = normal * 10.0 ** torch.arange(-20, 4, 0.6).reshape(-1, 1)[:40]
    tails = normal * torch.randn(40, 512, generator=generator).exp()
    few = torch.randint(-3, 4, (8, 512), generator=generator).float()
    even = torch.arange(512).float().expand(2, -1) / 64
    flat = torch.tensor([0.37, 0.0, -0.0, -2.0]).reshape(-1, 1).expand(-1, 512)
    sparse = tails * (torch.rand(40, 512, generator=generator) < 0.03)
    tiny = normal * 1e-41
    outlying = normal.clone()
    outlying[::2, ::37] = -3e4
    outlying[1::2, ::41] = 3e4
    kinds = [normal, scaled, tails, tails.abs(), -tails.abs(), few, even, flat, sparse, tiny]
    return torch.cat([*kinds, outlying])


@pytest.mark.parametrize("name", ENCODED)
def test_encoding(name: str, kernels: KernelRegistry) -> None:
    golden: Any = np.load(DATA / "golden_encode.npz")
    rows, importance = torch.from_numpy(golden["x"]), torch.from_numpy(golden["imatrix"])
    assert torch.equal(
        encode(name, rows, kernels=kernels), torch.from_numpy(golden[f"{name}__bytes"])
    )
    weights: tuple[Tensor | None, ...] = (None,)
    if TYPES[name].weighs:
        wanted = torch.from_numpy(golden[f"{name}__bytes_imatrix"])
        assert torch.equal(encode(name, rows, importance, kernels=kernels), wanted)
        generator = torch.Generator().manual_seed(2)
        weight = torch.rand(512, generator=generator) ** 4
        some = weight * (torch.rand(512, generator=generator) < 0.5)
        weights = (None, weight, some, torch.zeros(512))
    for weight in weights:
        for dtype in (torch.float32, torch.bfloat16):
            source = values().to(dtype)
            ours = encode(name, source, weight, kernels=kernels)
            assert torch.equal(ours, encode(name, source, weight, kernels=REFERENCE))


def test_explained_is_the_kernel_of_the_form_that_a_linear_computes_with() -> None:
    from quantmill.cli.kernels import explain_module

    file = str(DATA / "tiny-Q4_K_M.gguf")
    found = explain_module(file, None, "model.layers.0.mlp.down_proj", "cpu", "bfloat16", 1)
    first = found["operations"][0]
    assert first["operation"] == "matmul" and first["kernel"] == "cpu-matmul-affine"
