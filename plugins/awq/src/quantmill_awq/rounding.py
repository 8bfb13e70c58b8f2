"""Rounding to a 4-bit grid, by groups of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.config import group_width
from quantmill.forms import Affine, Codes, Group
from quantmill_awq.config import AwqConfig

__all__ = ["make_form", "nearest", "ranges"]

_TOP = 15.0


def ranges(groups: Tensor, config: AwqConfig, share: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ``groups`` ``[..., width]``, float32 ``[..., 1]``.

    ``share`` shrinks the range. Scales are what float16 holds, so codes fit what is stored.
    """
    if config.zero_point:
        low = groups.amin(dim=-1, keepdim=True).clamp(max=0) * share
        high = groups.amax(dim=-1, keepdim=True).clamp(min=0) * share
        scale = (high - low) / _TOP
    else:
        low = torch.zeros(())
        scale = groups.abs().amax(dim=-1, keepdim=True) * share / 7.0
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = scale.to(torch.float16).to(torch.float32).clamp(min=2.0**-24)
    if not config.zero_point:
        return scale, torch.full_like(scale, 8.0)
    return scale, torch.round(-low / scale).clamp(0, _TOP)


def nearest(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The values that ``groups`` are rounded to."""
    return (torch.round(groups / scale).add_(zero).clamp_(0, _TOP) - zero) * scale


def make_form(
    weight: Tensor, config: AwqConfig, dtype: torch.dtype, share: Tensor | None = None
) -> Affine:
    """The form of a float32 ``weight [out, in]``; ``share [out, groups]`` shrinks ranges."""
    rows, columns = weight.shape
    width = group_width(config.group_size, columns)
    groups = -(-columns // width)
    pad = groups * width - columns
    blocks = torch.nn.functional.pad(weight, (0, pad)).reshape(rows, groups, width)
    scale, zero = ranges(blocks, config, 1.0 if share is None else share.unsqueeze(-1))
    codes = torch.round(blocks / scale).add_(zero).clamp_(0, _TOP).to(torch.uint8)
    codes = codes.reshape(rows, -1)[:, :columns].contiguous()
    return Affine(
        Codes.pack(codes, 4, "dense"),
        scale.squeeze(-1).to(torch.float16),
        Group(width),
        zero.squeeze(-1).to(torch.uint8),
        "zero",
        dtype=dtype,
    )
