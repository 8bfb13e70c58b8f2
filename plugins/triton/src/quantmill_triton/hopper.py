"""The launch of the kernel for Hopper GPUs. Importing this module imports Triton and its Gluon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantmill_triton.facts import ROWS, Facts
from quantmill_triton.hopper_kernel import PAIRS, TILES, streamed_kernel
from quantmill_triton.launches import Launch

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill_triton.configs import Config
    from quantmill_triton.launch import Weight

__all__ = ["matmul_streamed", "streamed_launch"]

_REGISTERS = 1 << 16
"""Of a processor."""
_MOST_REGISTERS = 248
"""Of a thread: the most of those that come in eights."""


def streamed_launch(
    facts: Facts, factor: float, config: Config, tiles: int, parts: int, biased: bool
) -> Launch:
    """How the kernel is launched for such weights and so many tiles of activations."""
    constants = {
        "BLOCKS": config.bn // ROWS,
        "BM": config.bm,
        "STAGES": config.stages,
        "HALF": facts.scales == 2,
        "WARPS": config.warps,
        "BIAS": biased,
        "FACTOR": factor,
        "SPLIT": parts > 1,
        "EARLY": config.early,
    }
    # When the kernel starts all threads have as many, and the resident programs fit a processor;
    # the warps that multiply then take over most of those of the four that do not.
    registers = _REGISTERS // (32 * (config.warps + 4) * config.resident) // 8 * 8
    options = {
        "launch_pdl": config.early >= 0,
        "num_warps": config.warps,
        "maxnreg": min(registers, _MOST_REGISTERS),
    }
    grid = (-(-facts.rows // config.bn) * tiles, parts, 1)
    return Launch(streamed_kernel, grid, constants, options)


def matmul_streamed(
    launch: Launch,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    facts: Facts,
    config: Config,
    part: int,
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill ``out`` of ``results``, which are also the work space and the locks of a split matmul.

    ``x`` bfloat16 or float16 ``[rows, columns]``, its columns sorted as the weight's; 4 bits in
    groups of 128, whole chunks of columns, a zero beside each scale. ``part`` chunks are a
    program's.
    """
    # The copy engine wants rows that begin at 16 bytes.
    if x.data_ptr() % 16 or x.stride(0) % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    width = facts.width
    columns = [facts.columns // width, x.shape[0], width]
    block = [facts.slices, config.bm, width]
    activations = TensorDescriptor(x, columns, [width, x.stride(0), 1], block, TILES)
    kept = weight.descriptors
    described = None if kept is None else kept.get(config.bn)
    if described is None:
        described = _described(weight, facts, config.bn)
        if kept is not None:
            kept[config.bn] = described
    codes, chunks = weight.codes, facts.chunks
    tensors = (codes, codes if bias is None else bias, *results)
    launch(tensors, (x.shape[0], facts.rows, chunks, part), (activations, *described))


def _described(
    weight: Weight, facts: Facts, rows: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Codes and pairs, for tiles of so many rows."""
    codes, pairs = weight.codes, weight.scale
    length, width = facts.chunks * ROWS, facts.width
    shape, strides = [codes.shape[0], length, width], [length * width, width, 1]
    block = [rows // ROWS, ROWS, width]
    return (
        TensorDescriptor(codes, shape, strides, block, TILES),
        TensorDescriptor(pairs, list(pairs.shape), [pairs.shape[1], 1], [2, rows], PAIRS),
    )
