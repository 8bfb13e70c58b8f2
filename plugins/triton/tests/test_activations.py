"""Activations rounded to 8-bit floats, against the definition of the operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

TOP, LEAST = 448.0, 1e-12


def defined(x: Tensor, size: int | None, bound: float | None, rows: int) -> tuple[Tensor, Tensor]:
    """Codes as float32 ``[rows, in]`` and scales ``[rows, blocks]``."""
    columns = x.shape[1]
    width = size or columns
    work = functional.pad(x.float(), (0, -columns % width, 0, rows - x.shape[0]))
    tiles = work.unflatten(1, (-1, width))
    scale = tiles.abs().amax(dim=2).clamp(min=LEAST, max=bound) / TOP
    codes = (tiles / scale.unsqueeze(2)).clamp(-TOP, TOP).flatten(1)[:, :columns]
    return codes, scale


@pytest.mark.parametrize(
    ("shape", "size", "bound", "more"),
    [
        ((5, 256), None, None, 0),
        ((3, 100), None, 1.5, 0),
        ((2, 9000), None, None, 0),
        ((1, 512), 128, None, 15),
        ((7, 640), 128, None, 9),
        ((2, 4224), 128, None, 14),
        ((4, 96), 32, None, 0),
        ((0, 256), 128, None, 0),
    ],
)
def test_codes_and_scales_are_those_of_the_definition(
    shape: tuple[int, int], size: int | None, bound: float | None, more: int, device: str
) -> None:
    from quantmill_triton.activations import activations

    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.logspace(-3, 2, shape[1])).to(torch.float16).to(device)
    if shape[0]:
        x[0] = 0
    codes, scale = activations(x, size=size, bound=bound, rows=shape[0] + more)
    wanted, steps = defined(x, size, bound, shape[0] + more)
    assert codes.shape == wanted.shape and scale.shape == steps.shape
    filled = shape[0] if size is None else scale.shape[0]
    torch.testing.assert_close(scale[:filled], steps[:filled], rtol=1e-6, atol=0)
    assert (codes[shape[0] :].float() == 0).all()
    if size is not None and scale.numel():
        assert scale.stride(0) == 1, "tokens are neighbours"
    # Half a step of E4M3, which has 3 bits of mantissa and a least step of 2**-9.
    room = torch.maximum(wanted.abs() / 16, torch.full_like(wanted, 2.0**-10)) * 1.001
    near = (codes.float() - wanted).abs() <= room
    if device == "cpu":
        # Triton's interpreter loses the carry where a value rounds up to a power of two, and cuts
        # subnormal numbers.
        mantissa, _ = torch.frexp(wanted.abs())
        near |= (mantissa > 15 / 16) | (wanted.abs() < 2.0**-6)
    assert near.all()


def test_a_compiler_sees_one_node(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from quantmill_triton.activations import activations

    with FakeTensorMode():
        codes, scale = activations(torch.empty(3, 512), size=128, rows=16)
        assert codes.shape == (16, 512) and codes.dtype == torch.float8_e4m3fn
        assert scale.shape == (16, 4) and scale.stride() == (1, 16)
        codes, scale = activations(torch.empty(3, 512))
        assert codes.shape == (3, 512) and scale.shape == (3, 1)


def test_other_shapes_are_refused(device: str) -> None:
    from quantmill_triton.activations import activations

    with pytest.raises(ValueError, match="matrix"):
        activations(torch.empty(2, 3, 4, device=device))
    with pytest.raises(ValueError, match="power of two"):
        activations(torch.empty(3, 96, device=device), size=96)
