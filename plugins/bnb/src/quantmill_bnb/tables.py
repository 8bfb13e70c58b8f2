"""The tables of bitsandbytes: NF4 and FP4 (QLoRA, arXiv 2305.14314), 8-bit dynamic
(arXiv 2110.02861)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantmill.forms import register_table

__all__ = ["TABLES", "dynamic8", "fp4", "nf4"]


@cache
def nf4() -> Tensor:
    """float32 ``[16]``: quantiles of the normal distribution, asymmetric so that zero is exact."""
    return torch.tensor(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ],
        dtype=torch.float32,
    )


@cache
def fp4() -> Tensor:
    """float32 ``[16]``: sign, two bits of exponent, one of mantissa, divided by the largest."""
    positive = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    # The zero of code 8 has no sign, as in the peer's table: quant_map is compared bit for bit.
    values = torch.tensor([*positive, *(0.0 - value for value in positive)], dtype=torch.float32)
    return values / values.abs().max()


@cache
def dynamic8() -> Tensor:
    """float32 ``[256]``, ascending: seven decades, each with twice the fraction steps of the one
    below; in the middle of each step; zero and one added."""
    entries = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        middle = (edges[:-1] + edges[1:]) / 2.0
        values = (10.0 ** (exponent - 6) * middle).tolist()
        entries += values + [-value for value in values]
    return torch.tensor(sorted(entries), dtype=torch.float32)


TABLES = {"nf4": nf4, "fp4": fp4, "dynamic8": dynamic8}
for _name, _values in TABLES.items():
    register_table(_name, _values)
