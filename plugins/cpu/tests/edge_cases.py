"""All quantizers over edge-case shapes and values, on every level; prints a digest of the bytes.

Run as a program by test_sanitized.py: once with the installed library, and once with one that was
built with sanitizers (its path is the argument). ``overflow`` as second argument makes a mistake
on purpose: a call whose output is too short.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quantmill_cpu import native
from quantmill_cpu.ggml_types import TYPES

BLOCKS = (2, 64, 4096, 4098, 10000)
COUNTS = (0, 1, 2, 63, 65, 4095, 4096, 4097, 12289, 20001)
PANELS = ((1, 1, 1), (2, 33, 2), (128, 31, 40), (127, 65, 128), (96, 32, 1), (3, 0, 2), (0, 4, 1))
"""Columns, rows, and columns of a group."""
ROWS = ((1, 1), (3, 1), (1, 4095), (2, 4097), (70, 3), (5, 129), (0, 4), (4, 0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sources(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Ordinary, extreme and unaligned values; the last has a NaN in its middle."""
    generator = torch.Generator().manual_seed(count)
    ordinary = torch.randn(count, generator=generator).to(dtype)
    tops = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, -torch.finfo(dtype).tiny / 4])
    extreme = tops[torch.randint(0, 4, (count,), generator=generator)].to(dtype)
    whole = bytearray(1 + count * dtype.itemsize + 1)
    apart = torch.frombuffer(whole, dtype=torch.uint8)[1 : 1 + count * dtype.itemsize]
    apart.copy_(ordinary.view(torch.uint8))
    nan = ordinary.clone()
    nan[count // 2 : count // 2 + 1] = float("nan")
    tiny = ordinary * torch.finfo(dtype).tiny / 8
    found = [ordinary, extreme, torch.zeros(count, dtype=dtype), tiny, nan]
    return [*found, torch.frombuffer(whole, dtype=dtype, count=count, offset=1)] if count else found


def codebook(source: Tensor, table: Tensor, block: int) -> list[Tensor]:
    from quantmill_cpu.quantize import quantize_codebook

    count = source.numel()
    codes = torch.zeros(count if len(table) == 256 else (count + 1) // 2, dtype=torch.uint8)
    scale = torch.zeros(-(-count // block))
    bad = quantize_codebook(source, table=table, block_size=block, out_codes=codes, out_scale=scale)
    return [torch.tensor(bad)] if bad >= 0 else [codes, scale]


def rows_int8(source: Tensor) -> list[Tensor]:
    from quantmill_cpu.quantize import quantize_rows_int8

    codes, scale = torch.zeros(source.shape, dtype=torch.int8), torch.ones(source.shape[0])
    bad = quantize_rows_int8(source, out_codes=codes, out_scale=scale)
    return [torch.tensor(bad)] if bad >= 0 else [codes, scale]


def rounded(source: Tensor, group: int) -> list[Tensor]:
    """Ranges of groups, and the values as bytes and as packed codes of all widths."""
    from quantmill_cpu.quantize import absmax, extremes, round_bytes, round_codes

    top, (low, high) = absmax(source, group=group), extremes(source, group=group)
    found = [item.nan_to_num(7.0) + 0.0 for item in (top, low, high)]
    by = top.nan_to_num(1.0, posinf=1.0).clamp(min=1e-30)
    for kind in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        out = torch.zeros(source.shape, dtype=kind)
        if source.isfinite().all():
            round_bytes(source, by=by, out=out, group=group, multiply=False, top=100.0)
        found.append(out.view(torch.uint8))
    halves = torch.zeros(-(-source.numel() // 2), dtype=torch.uint8)
    out = halves.view(torch.float4_e2m1fn_x2)
    round_bytes(source, by=by, out=out, group=group, multiply=True, top=6.0)
    found.append(halves)
    for bits in range(1, 9):
        out = torch.zeros(-(-source.numel() * bits // 8), dtype=torch.uint8)
        how: dict[str, Any] = {"group": group, "multiply": bool(bits % 2), "bits": bits}
        how |= {"middle": 1.0, "edge": -0.5, "limits": (0, 2**bits - 1)}
        round_codes(source, by=by, minus=by, plus=None, out=out, **how)
        found.append(out)
    return found


def ggml_types(name: str) -> list[Tensor]:
    """Blocks from values, and values from any bytes, few and many, aligned and not."""
    from quantmill_cpu.ggml import codes, dequantize, quantize
    from quantmill_cpu.ggml_matmul import bind

    kind, found = TYPES[name], []
    points = torch.arange(kind.points, dtype=torch.int32).to(torch.int8)
    generator = torch.Generator().manual_seed(0)
    for rows, across in ((1, 1), (3, 5), (33, 2)):
        size, count = rows * across * kind.size, rows * across * kind.values
        whole = torch.randint(0, 256, (size + 1,), dtype=torch.uint8, generator=generator)
        for data in (whole[:-1], whole[1:]):
            out = torch.zeros(count)
            form: Any = SimpleNamespace(data=data, type_name=name, points=points, shape=(count,))
            found.append(dequantize(form, torch.float32, out).nan_to_num(1e30))
            form.data = data.view(rows, -1)
            if kind.bits:
                dtype = torch.int8 if kind.bits == 8 else torch.uint8
                taken = torch.zeros(count * kind.bits // 8, dtype=dtype)
                codes(form.data, type_name=name, out=taken)
                found.append(taken)
            form.tensors = lambda held=form.data: {"data": held}
            for tokens in (0, 1, 6):  # sums may be ordered otherwise: run, and not compared
                bind(form)(torch.ones(tokens, across * kind.values), None)
        for dtype in DTYPES if kind.made else ():
            *finite, _, unaligned = sources(count, dtype)
            weights = torch.rand(across * kind.values, generator=generator)
            for source in (*finite, unaligned):
                for importance in (None, weights, torch.zeros_like(weights)):
                    blocks = torch.zeros(size, dtype=torch.uint8)
                    block = source.reshape(rows, -1)
                    quantize(block, type_name=name, importance=importance, out=blocks)
                    found.append(blocks)
    return found


def panels(columns: int, rows: int, width: int) -> list[Tensor]:
    """Columns that are rounded, and chosen again, from weights that are ordinary and are not."""
    from quantmill_cpu.calibrate import compensate, descend

    generator = torch.Generator().manual_seed(columns)
    factor = torch.randn(columns, columns, generator=generator).mul_(0.1).triu_(1)
    factor.diagonal().fill_(1.5)
    groups = [column // width for column in range(columns)]
    begins, ends = [0] * columns, [0] * columns
    for start in range(0, columns, width):
        size = min(width, columns - start)
        begins[start] = ends[start + size - 1] = size
    found = []
    for top, symmetric, exponent in ((15, True, 2.0), (1, False, 0.0), (255, False, 2.4)):
        for source in sources(columns * rows, torch.float32)[:-1]:
            scales = torch.ones(-(-columns // width), rows)
            zeros, panel = torch.zeros_like(scales), source.reshape(columns, rows).clone()
            codes = torch.zeros(panel.shape, dtype=torch.uint8)
            how = {"top": top, "symmetric": symmetric, "exponent": exponent}
            compensate(panel, factor, groups, begins, scales, zeros, codes, **how)
            steps = codes.float() - zeros[groups]
            slope = panel.clone()
            descend(slope, factor, groups, ends, scales, zeros, steps, top=top)
            found += [codes, *(item.nan_to_num(7.0) for item in (panel, scales, steps, slope))]
    return found


def values_in_panels() -> list[Tensor]:
    """Scales of few and many rows in panels, of all sizes of a value."""
    from quantmill_cpu.codes import panels_of_values

    return [
        panels_of_values(torch.arange(rows * groups).reshape(rows, groups).to(dtype)).to(
            torch.int32
        )
        for rows, groups in ((1, 1), (16, 3), (17, 1), (100, 9))
        for dtype in (torch.int8, torch.float16, torch.float32)
    ]


def moments_run() -> None:
    """Sums may be ordered otherwise: run, and not compared."""
    from quantmill_cpu.calibrate import moments, no_dots

    for tokens, columns in ((0, 3), (1, 1), (3, 65), (1025, 130), (2049, 63)):
        if no_dots() is None:
            x = torch.ones(tokens, columns, dtype=torch.bfloat16)
            total = torch.zeros(columns, columns)
            moments(x, out=total)
            assert (total.triu() == torch.full_like(total, tokens).triu()).all()


def attention_run() -> None:
    """As with moments."""
    from quantmill_cpu.attention import attention
    from quantmill_cpu.calibrate import no_dots

    for queries, keys, dim, wide in (
        (0, 1, 2, 1),
        (1, 1, 2, 3),
        (17, 65, 6, 64),
        (33, 33, 66, 130),
    ):
        if no_dots() is None:
            q = torch.ones(2, queries, 4, dim, dtype=torch.bfloat16).transpose(1, 2)
            k = torch.ones(2, 2, keys, dim, dtype=torch.bfloat16)
            v = torch.ones(2, 2, keys, wide, dtype=torch.bfloat16)
            found = attention(q, k, v, scale=1.0, causal=queries == keys)
            assert (found == 1).all()


def linear_run() -> None:
    """As with moments; a weight may begin at any address of its elements."""
    from quantmill_cpu.calibrate import no_dots
    from quantmill_cpu.linear import ROWS, linear

    for rows, columns in ((1, 1), (3, 31), (5, 127), (2, 129), (4, 300)):
        for count in range(1, ROWS + 1):
            if no_dots() is None:
                x = torch.ones(count, columns, dtype=torch.bfloat16)
                weight = torch.ones(rows * columns + 1, dtype=torch.bfloat16)[1:]
                bias = torch.ones(rows, dtype=torch.bfloat16)
                found = linear(x, weight.reshape(rows, columns), bias)
                assert (found == torch.tensor(columns + 1.0).bfloat16()).all()


def product_run() -> None:
    """As with moments; rows may lie apart and begin at any address of their elements."""
    from quantmill_cpu.calibrate import product

    for depth, rows, columns in ((0, 2, 3), (1, 1, 1), (7, 13, 50), (193, 9, 193), (400, 65, 97)):
        for wide in (torch.ones(depth, rows + 3), torch.ones(rows + 3, depth).t()):
            found = product(wide[:, 1 : rows + 1], torch.ones(depth, columns))
            assert (found == torch.full((rows, columns), float(depth))).all()


def digest() -> str:
    small = torch.linspace(-1, 1, 16)[torch.randperm(16, generator=torch.Generator())]
    large = torch.linspace(-1, 1, 256)
    found = hashlib.sha256()
    for dtype in DTYPES:
        for count in COUNTS:
            for source in sources(count, dtype):
                for block in BLOCKS:
                    results = codebook(source, small, block)
                    if dtype == torch.float32:
                        results += codebook(source, large, block)
                    for tensor in results:
                        found.update(tensor.numpy().tobytes())
        for shape in ROWS:
            for source in sources(shape[0] * shape[1], dtype):
                block = source.reshape(shape)
                for tensor in (*rows_int8(block), *rounded(block, 1), *rounded(block, 4096)):
                    found.update(tensor.numpy().tobytes())
    moments_run()
    attention_run()
    linear_run()
    product_run()
    for tensor in values_in_panels():
        found.update(tensor.numpy().tobytes())
    for columns, rows, width in PANELS:
        for tensor in panels(columns, rows, width):
            found.update(tensor.numpy().tobytes())
    for name in TYPES:
        for tensor in ggml_types(name):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def main(library: str = "", mistake: str = "") -> None:
    torch.set_num_threads(3)
    if library:
        native._FILE = Path(library)
    if mistake:
        short, scale = torch.zeros(60, dtype=torch.int8), torch.zeros(1)
        source = torch.ones(64)
        native.library().qm_quantize_rows_int8(
            source.data_ptr(), 0, 1, 64, short.data_ptr(), scale.data_ptr(), 1
        )
    for level in native.levels():
        native.use_level(level)
        print(level, digest())


if __name__ == "__main__":
    main(*sys.argv[1:])
