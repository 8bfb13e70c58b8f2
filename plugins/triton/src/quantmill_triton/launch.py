"""Launches of the kernels over prepared tensors, and the locks that split matmuls need."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from quantmill_triton.available import gluon_known, interpreted
from quantmill_triton.configs import FUSED_ROWS, Config, choose, split_of
from quantmill_triton.expand import dequantize_kernel
from quantmill_triton.facts import ROWS, Facts
from quantmill_triton.kernels import matmul_kernel
from quantmill_triton.launches import Launch

__all__ = ["BUFFER_BYTES", "Weight", "dequantize", "matmul", "matmul_fused", "matmul_grouped"]

BUFFER_BYTES = 128 << 20
"""Most bytes of dequantized weight that a large batch holds at a time."""

_GATHER_ROWS = 8
"""Up to so many rows of activations the matmul gathers columns itself (act-order)."""

_HALVES = (torch.bfloat16, torch.float16)


class Weight(NamedTuple):
    """The tensors of the layout that kernels read; see :mod:`quantmill_triton.layout`."""

    codes: Tensor
    high: Tensor | None
    scale: Tensor
    """``scale`` or ``pairs`` of the layout."""
    offset: Tensor | None
    table: Tensor | None
    lut: Tensor | None
    unit: Tensor | None
    order: Tensor | None
    descriptors: dict[int, tuple[Any, Any]] | None = None
    """What the copy engine is told of codes and scales, by the rows of a tile: kept here where the
    weight is kept."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the layout, as operators take them."""
        return self[:8]

    @property
    def filled(self) -> list[Tensor]:
        """The same, with codes in place of those that the weight lacks: no kernel reads them."""
        return [self.codes if item is None else item for item in self.tensors]


class _Machine(NamedTuple):
    processors: int
    shared: int
    assembly: bool
    early: bool
    """Whether a kernel can start while the one before it ends (programmatic dependent launch)."""
    streams: bool
    """Whether the kernel for Hopper runs."""


@lru_cache(maxsize=64)
def _machine(device: torch.device) -> _Machine:
    if device.type != "cuda":
        return _Machine(4, 1 << 30, False, False, False)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    assembly = torch.version.cuda is not None and not interpreted()
    early = assembly and properties.major >= 9
    streams = early and (properties.major, properties.minor) == (9, 0) and gluon_known()
    return _Machine(properties.multi_processor_count, shared, assembly, early, streams)


class _Locks:
    """Counters that are 0 between launches: one region per stream, one per captured launch.

    Launches of a stream follow each other, so they share a region. A captured launch may be
    replayed beside anything, so each has a region of its own, as long as there are any.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Tensor | None = None
        self._used = 0
        self._streams: dict[int, Tensor] = {}

    def take(self, count: int) -> Tensor:
        """int32 ``[at least count]``, zeros."""
        if self._device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=self._device)
        if torch.cuda.is_current_stream_capturing():
            return self._fresh(count)
        # As Triton itself asks; PyTorch's own way makes an object for it.
        stream = driver.active.get_current_stream(self._device.index)
        held = self._streams.get(stream)
        if held is None or held.numel() < count:
            if self._pool is None:
                self._pool = torch.zeros(1 << 20, dtype=torch.int32, device=self._device)
                # Zeros are there before another stream can take a part of them.
                torch.cuda.current_stream(self._device).synchronize()
            held = self._streams[stream] = self._fresh(max(count, 4096))
        return held

    def _fresh(self, count: int) -> Tensor:
        count = -(-count // 4) * 4  # Each region begins at 16 bytes, as Triton likes addresses.
        if self._pool is None or self._used + count > self._pool.numel():
            return torch.zeros(count, dtype=torch.int32, device=self._device)
        start, self._used = self._used, self._used + count
        return self._pool[start : self._used]


@lru_cache(maxsize=64)
def _locks(device: torch.device) -> _Locks:
    return _Locks(device)


def _fast(facts: Facts, machine: _Machine) -> bool:
    """Whether slices are unpacked in assembly, two words at a time."""
    if not machine.assembly:
        return False
    if facts.paired:
        return True
    exact = facts.values == 0 and facts.offset in (0, 1) and facts.high_bits == 0
    return exact and facts.bits in (2, 4, 8)


def matmul(x: Tensor, weight: Weight, bias: Tensor | None, facts: Facts, factor: float) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``[rows, columns]``: fused for halves and few rows."""
    if x.dtype in _HALVES and 0 < x.shape[0] <= FUSED_ROWS:
        return matmul_fused(x, weight, bias, facts, factor)
    if x.shape[0] == 0:
        return x.new_empty((0, facts.rows))
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    # Whole tiles of rows, so that each piece begins with a tile.
    step = max(ROWS, BUFFER_BYTES // (facts.columns * x.element_size()) // ROWS * ROWS)
    if step >= facts.rows:
        whole = _dequantize(weight, facts, factor, x.dtype, 0, facts.rows, ordered=True)
        return torch.nn.functional.linear(x, whole, bias)
    out = x.new_empty((x.shape[0], facts.rows))
    for start in range(0, facts.rows, step):
        stop = min(facts.rows, start + step)
        part = _dequantize(weight, facts, factor, x.dtype, start, stop, ordered=True)
        torch.mm(x, part.t(), out=out[:, start:stop])
    return out if bias is None else out.add_(bias)


def matmul_grouped(
    x: Tensor, weights: Weight, ends: Tensor, bias: Tensor | None, facts: Facts, factor: float
) -> Tensor:
    """Products with many weights of the same facts, their tensors stacked: rows of ``x`` up to
    ``ends[i]`` int64 with the ``i``-th one. Rows after the last end are zeros. Nothing waits for
    the device."""
    rows, count = x.shape[0], ends.numel()
    if not (x.dtype in _HALVES and rows and count):
        return x.new_zeros((rows, facts.rows))
    machine = _machine(x.device)
    config = choose(facts, min(-(-rows // count), FUSED_ROWS), machine.shared)
    # Each matrix with rows has at most one tile that is not full.
    tiles = min(rows, rows // config.bm + min(rows, count))
    split = split_of(facts, min(rows, tiles * config.bm), config, machine.processors)
    return matmul_fused(x, weights, bias, facts, factor, config, split, (ends, tiles))


def matmul_fused(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    facts: Facts,
    factor: float,
    config: Config | None = None,
    split: tuple[int, int] | None = None,
    grouped: tuple[Tensor, int] | None = None,
) -> Tensor:
    """The fused kernel for ``x`` bfloat16 or float16 ``[rows, columns]``, at least one row.

    ``grouped`` are the ends of each matrix' rows, and tiles of rows that are enough for all.
    """
    ends, tiles = (x, 0) if grouped is None else grouped
    count = 0 if grouped is None else ends.numel()
    rows = x.shape[0]
    plan = _plan(facts, factor, rows, x.device, bias is not None, config, split, count, tiles)
    if weight.order is not None and not plan.gathers:
        x = x.index_select(1, weight.order)
    if x.stride(1) != 1:
        x = x.contiguous()
    if grouped is None:
        out = x.new_empty((rows, facts.rows))
        steps: tuple[int, ...] = _NO_STEPS
    else:
        out = x.new_zeros((rows, facts.rows))  # No program writes rows that belong to no matrix.
        tensors = (weight.codes, weight.high, weight.scale, weight.offset)
        steps = tuple(0 if item is None else item.stride(0) for item in tensors)
    work, locks = out, out
    if plan.split[0] > 1:
        work = x.new_empty((plan.split[0], rows, facts.rows), dtype=torch.float32)
        locks = _locks(x.device).take(plan.locks)
    if plan.config.streamed:
        from quantmill_triton.hopper import matmul_streamed

        part, results = plan.split[1], (out, work, locks)
        matmul_streamed(plan.launch, x, weight, bias, facts, plan.config, part, results)
        return out
    codes, high, scale, offset, table, lut, unit, order = weight.filled
    if plan.bytewise:
        table = unit
    plan.launch(
        (
            x,
            codes,
            high,
            scale,
            offset,
            table,
            lut,
            order,
            codes if bias is None else bias,
            out,
            work,
            locks,
            ends,
        ),
        (rows, *plan.sizes[:2], x.stride(0), *plan.sizes[2:], scale.shape[-1], count, *steps),
    )
    return out


_NO_STEPS = (0, 0, 0, 0)


class _Plan(NamedTuple):
    """What is the same for all launches with as many rows of weights with the same facts."""

    config: Config
    split: tuple[int, int]
    gathers: bool
    """Whether the kernel itself gathers columns that are sorted by group."""
    bytewise: bool
    """Whether entries of tables are put together from their bytes."""
    locks: int
    sizes: tuple[int, ...]
    """Rows and columns of the weight, its chunks, those of a part, its groups."""
    launch: Launch


def _of_layout(facts: Facts) -> dict[str, Any]:
    """The constants with which kernels read a weight."""
    return {
        "BITS": facts.bits,
        "HIGH_BITS": facts.high_bits,
        "WIDTH": facts.width,
        "SLICES": facts.slices,
        "GROUP": facts.group,
        "TALL": facts.tall,
        "VALUES": facts.values,
        "OFFSET": facts.offset,
        "MIDDLE": facts.middle,
        "PAIRED": bool(facts.paired),
        "SCALES": facts.scales,
    }


@lru_cache(maxsize=4096)
def _plan(
    facts: Facts,
    factor: float,
    rows: int,
    device: torch.device,
    biased: bool,
    config: Config | None,
    split: tuple[int, int] | None,
    count: int,
    tiles: int,
) -> _Plan:
    """``count`` matrices, or 0, with ``tiles`` of rows in all."""
    machine = _machine(device)
    streams = machine.processors if machine.streams and not count else 0
    config = config or choose(facts, rows, machine.shared, streams)
    parts, part = split or split_of(facts, rows, config, machine.processors)
    gathers = count > 0 or (rows <= _GATHER_ROWS and not config.streamed)
    fast = _fast(facts, machine)
    grid = (-(-facts.rows // config.bn), parts, tiles or -(-rows // config.bm))
    constants = {
        **_of_layout(facts),
        "FLUSH": facts.flush,
        "GATHER": bool(facts.ordered) and gathers,
        "EVEN": facts.columns % facts.chunk == 0 and facts.chunks % (parts * config.teams) == 0,
        "BIAS": biased,
        "PRESCALE": config.prescale or facts.offset in (2, 3) or (facts.values == 1 and not fast),
        "FAST": fast,
        "WIDE": interpreted(),
        "SPLIT": parts > 1,
        "BM": config.bm,
        "TEAMS": config.teams,
        "BN": config.bn,
        "MATRICES": 0 if count == 0 else 1 << (count - 1).bit_length(),
        "FACTOR": factor,
        # Which rows an expert has is known only when the kernel before has ended.
        "EARLY": config.early if machine.early and not count else -1,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if constants["EARLY"] >= 0:
        options["launch_pdl"] = True
    launch = Launch(matmul_kernel, grid, constants, options)
    if config.streamed:
        from quantmill_triton.hopper import streamed_launch

        launch = streamed_launch(facts, factor, config, grid[2], parts, biased)
    sizes = (facts.rows, facts.columns, facts.chunks, part, facts.groups)
    bytewise = bool(facts.paired) and fast
    return _Plan(config, (parts, part), gathers, bytewise, grid[0] * grid[2], sizes, launch)


def dequantize(weight: Weight, facts: Facts, factor: float, dtype: torch.dtype) -> Tensor:
    """The whole weight ``[rows, columns]``, columns in their original order."""
    return _dequantize(weight, facts, factor, dtype, 0, facts.rows, ordered=False)


def _dequantize(
    weight: Weight,
    facts: Facts,
    factor: float,
    dtype: torch.dtype,
    start: int,
    stop: int,
    *,
    ordered: bool,
) -> Tensor:
    """Rows ``start`` (a multiple of 64) to ``stop``; ``ordered`` leaves columns as sorted."""
    codes, high, scale, offset, table, _, _, order = weight.filled
    out = torch.empty((stop - start, facts.columns), dtype=dtype, device=codes.device)
    _expansion(facts, factor, stop - start, ordered, codes.device)(
        (codes, high, scale, offset, table, order, out),
        (start, stop, facts.columns, facts.chunks, facts.groups, scale.shape[1]),
    )
    return out


@lru_cache(maxsize=4096)
def _expansion(facts: Facts, factor: float, rows: int, ordered: bool, _: torch.device) -> Launch:
    constants = {
        **_of_layout(facts),
        "GATHER": bool(facts.ordered) and not ordered,
        "FACTOR": factor,
    }
    grid = (facts.chunks, -(-rows // ROWS), 1)
    return Launch(dequantize_kernel, grid, constants, {"enable_fp_fusion": False})
