"""Activations rounded to the grid of a group's ``input_activations``, and taken back to float.

As compressed-tensors 0.20 does in its own forward pass: what vLLM's kernels compute, up to the
rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantmill_compressed_tensors.fp4 import e2m1, power_scales
from quantmill_compressed_tensors.schemes import Args

__all__ = ["is_applied", "quantize_inputs"]


def is_applied(args: Args) -> bool:
    """Whether inputs can be rounded so."""
    if args.type == "int" or args.num_bits == 8:
        return True
    return args.num_bits == 4 and (args.is_nvfp4 or args.is_mx)


def quantize_inputs(x: Tensor, args: Args, given: Mapping[str, Tensor] | None = None) -> Tensor:
    """``x [..., in]`` rounded to the grid of ``args``, in its own dtype.

    ``given`` holds, one value each, ``input_scale`` and ``input_zero_point`` of static
    quantization, and the global scale (``inputs``) of NVFP4; without them each token, group of a
    token or the whole of ``x`` gives its own.
    """
    given = given or {}
    if args.is_nvfp4:
        return _nvfp4(x, args, given.get("inputs"))
    if args.is_mx and args.dynamic:
        return _mx(x, args)
    if args.type == "float":
        low, high = -448.0, 448.0
    else:
        low, high = -(2.0 ** (args.num_bits - 1)), 2.0 ** (args.num_bits - 1) - 1
    shape = x.shape
    scale, zero = given.get("input_scale"), given.get("input_zero_point")
    if args.dynamic:
        if args.means in ("group", "tensor_group") and args.group_size:
            x = x.unflatten(-1, (-1, args.group_size))
        scale, zero = _measured(x, args, low, high)
    elif scale is None:
        return x
    else:
        scale = scale.to(x.dtype).reshape(())
        zero = None if zero is None or args.symmetric else zero.to(x.dtype).reshape(())
    codes = x / scale
    if zero is not None:
        codes = codes + zero
    codes = codes.clamp(low, high)
    if args.type == "float":
        codes = codes.to(torch.float8_e4m3fn).to(x.dtype)
    else:
        codes = torch.round(codes)
    if zero is not None:
        codes = codes - zero
    return (codes * scale).reshape(shape)


def _measured(x: Tensor, args: Args, low: float, high: float) -> tuple[Tensor, Tensor | None]:
    """Scales (and zero points) from the range of ``x``, widened to zero."""
    if args.means == "tensor":
        least, most = (item.reshape([1] * x.ndim) for item in torch.aminmax(x))
    else:
        least, most = torch.aminmax(x, dim=-1, keepdim=True)
    least, most = least.clamp(max=0), most.clamp(min=0)
    tiny = torch.finfo(x.dtype).eps
    if args.symmetric:
        scale = torch.maximum(-least, most) / ((high - low) / 2)
        return torch.where(scale == 0, tiny, scale), None
    scale = (most - least) / (high - low)
    scale = torch.where(scale == 0, tiny, scale)
    return scale, torch.round((low - least / scale).clamp(low, high))


def _nvfp4(x: Tensor, args: Args, whole: Tensor | None) -> Tensor:
    """Groups with an E4M3 scale, measured, under a stored one."""
    if whole is None:
        return x
    tiles = x.to(torch.float32).unflatten(-1, (-1, args.group_size or 16))
    # The library measures in the dtype of the inputs.
    most = (tiles.abs().amax(dim=-1, keepdim=True).to(x.dtype) / 6.0).to(torch.float32)
    scale = (most * whole.to(torch.float32)).clamp(max=448.0).to(torch.float8_e4m3fn)
    wide = scale.to(torch.float32)
    wide = torch.where(wide == 0, 0.125, wide) / whole.to(torch.float32)
    return (e2m1(tiles / wide) * wide).flatten(-2).to(x.dtype)


def _mx(x: Tensor, args: Args) -> Tensor:
    """Groups of 32 that share a power of two, of 4- or 8-bit floats."""
    tiles = x.to(torch.float32).unflatten(-1, (-1, args.group_size or 32))
    most = tiles.abs().amax(dim=-1, keepdim=True)
    scale = power_scales(most, 2 if args.num_bits == 4 else 8).to(torch.float32)
    if args.num_bits == 4:
        codes = e2m1(tiles / scale)
    else:
        codes = (tiles / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(torch.float32)
    return (codes * scale).flatten(-2).to(x.dtype)
