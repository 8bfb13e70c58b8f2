"""One GGUF file from another: tensors quantized anew by a mix, metadata kept.

What ``llama-quantize`` does. A float file gives the file that it would write, byte for byte where
both are without an importance matrix or have the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantmill.findings import QuantmillError
from quantmill.kernels import KernelRegistry
from quantmill_gguf import codes
from quantmill_gguf.byteorder import swapped
from quantmill_gguf.container import GgufFile, GgufTensor, open_split
from quantmill_gguf.encode import MADE, decode, encode
from quantmill_gguf.imatrix import COUNTS as IMATRIX_COUNTS
from quantmill_gguf.imatrix import Imatrix
from quantmill_gguf.mixes import Mix, MixOptions, ModelFacts, mix_named
from quantmill_gguf.tensor_types import choose
from quantmill_gguf.types.sizes import PLAIN
from quantmill_gguf.writer import GgufWriter, TensorSpec

__all__ = ["blocks_of", "check_types", "float_rows", "requantize"]

_PIECE: Final = 1 << 20
"""Values that are worked on at a time."""
_QUANTIZATION_VERSION: Final = 2
"""Of ggml's block formats, ``general.quantization_version``."""
_FLOATS: Final = ("F32", "F16", "BF16", "F64")
_READ: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Progress = Callable[[int, int, str], None]
"""Gets bytes of the source that are done, all of them, and the tensor at hand."""


def requantize(
    source: Path,
    out: Path,
    mix: Mix | str,
    options: MixOptions | None = None,
    *,
    imatrix: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str | int] | None = None,
    allow_requantize: bool = False,
    kernels: KernelRegistry | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write ``source`` with the types of a mix to ``out``, which appears when it is complete.

    Args:
        source: a GGUF file or the first of a split.
        out: the file to write; one that is there is replaced.
        mix: a mix or its name.
        options: see :class:`~quantmill_gguf.mixes.MixOptions`.
        imatrix: an importance matrix of llama.cpp's; the file then says which one.
        metadata: keys to add or to replace, with their types in ``kinds``.
        kinds: value types of ``metadata``.
        allow_requantize: blocks may be decoded and quantized once more, with a second loss.
        kernels: to choose from.
        progress: see :data:`Progress`.

    Returns:
        The types by tensor name.

    Raises:
        QuantmillError: the source is damaged, a type can't be made, or a weight or its importance
            does not fit; nothing is then written.
    """
    if isinstance(mix, str):
        mix = mix_named(mix)
    files = open_split(source)
    owners = {name: file for file in files for name in file.tensors}
    tensors = {name: file.tensors[name] for name, file in owners.items()}
    first = files[0]
    matrix = None if imatrix is None else Imatrix.read(imatrix)
    options = replace(options or MixOptions(), importance=matrix is not None)
    facts = ModelFacts.of(first.metadata)
    listed = [(name, item.shape, item.type.name) for name, item in tensors.items()]
    types = choose(mix, facts, listed, options)
    check_types(types, {name: item.type.name for name, item in tensors.items()}, allow_requantize)
    specs = [TensorSpec(name, types[name], tensors[name].shape) for name in types]
    keys = {k: v for k, v in first.metadata.items() if not k.startswith("split.")}
    replaced = {
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": mix.file_type,
        **(matrix.facts(imatrix) if matrix is not None and imatrix is not None else {}),
        **(metadata or {}),
    }
    for key in replaced:
        keys.pop(key, None)
    keys.pop("general.alignment", None)
    numbers = ("general.quantization_version", "general.file_type", *IMATRIX_COUNTS)
    written = {**first.kinds, **dict.fromkeys(numbers, "uint32"), **(kinds or {})}
    total = sum(item.nbytes for item in tensors.values())
    done = 0
    with GgufWriter(out, {**keys, **replaced}, specs, kinds=written) as writer:
        for spec in specs:
            tensor, file = tensors[spec.name], owners[spec.name]
            if progress is not None:
                progress(done, total, spec.name)
            entry = None if matrix is None else matrix.entries.get(spec.name)
            weights = None if entry is None else entry.mean()
            for part in blocks_of(file, tensor, spec.type_name, weights, kernels):
                writer.write(part)
            done += tensor.nbytes
    if progress is not None:
        progress(total, total, "done")
    return types


def check_types(types: Mapping[str, str], sources: Mapping[str, str], again: bool) -> None:
    """Refuse types that can't be made, and blocks that would be quantized a second time.

    Raises:
        QuantmillError: ``QM-GGUF-009`` or ``034``.
    """
    for name, kind in types.items():
        there = sources[name]
        if kind == there:
            continue
        if kind not in MADE:
            fix = f"take another type: {', '.join(MADE)}"
            raise QuantmillError(codes.TYPE(name, f"{kind} can't be made", fix))
        if there not in _FLOATS and not again:
            raise QuantmillError(
                codes.REQUANTIZED(
                    name,
                    f"it is {there} already, and its errors would add to those of {kind}",
                    "start from a float file, or allow requantizing",
                )
            )


def float_rows(
    file: GgufFile,
    tensor: GgufTensor,
    first: int,
    last: int,
    kernels: KernelRegistry | None = None,
) -> Tensor:
    """Rows of a tensor of any rank as float32 ``[rows, columns]``."""
    raw = _raw(file, tensor, first, last)
    return decode(tensor.type.name, raw, kernels=kernels)


def _values(
    file: GgufFile, tensor: GgufTensor, first: int, last: int, kernels: KernelRegistry | None
) -> Tensor:
    """The same in the dtype that the file has, without a copy, where encoders read it."""
    dtype = _READ.get(tensor.type.name)
    if dtype is None:
        return float_rows(file, tensor, first, last, kernels)
    return _raw(file, tensor, first, last).view(dtype)


def _raw(file: GgufFile, tensor: GgufTensor, first: int, last: int) -> Tensor:
    """Little-endian bytes of rows, uint8 ``[rows, row bytes]``."""
    width = tensor.type.row_bytes(tensor.shape[-1] if tensor.shape else 1)
    if (last - first) * width == 0:
        return torch.empty(last - first, width, dtype=torch.uint8)
    raw = torch.frombuffer(
        file.data,
        dtype=torch.uint8,
        count=(last - first) * width,
        offset=tensor.start + first * width,
    ).view(last - first, width)
    return swapped(raw, tensor.type) if file.big_endian else raw


def blocks_of(
    file: GgufFile,
    tensor: GgufTensor,
    kind: str,
    importance: Tensor | None = None,
    kernels: KernelRegistry | None = None,
) -> Iterator[Tensor]:
    """The bytes of a tensor as another type (or the same), piece by piece.

    Raises:
        QuantmillError: see :func:`quantmill_gguf.encode.encode`.
    """
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = tensor.numel // max(1, columns)
    step = max(1, _PIECE // max(1, columns))
    experts, weights = 1, None
    if importance is not None and kind not in PLAIN:
        experts, weights = _per_expert(tensor, importance)
    within = rows // experts
    for expert in range(experts):
        for start in range(0, within, step):
            first = expert * within + start
            last = expert * within + min(within, start + step)
            if kind == tensor.type.name:
                yield _raw(file, tensor, first, last)
                continue
            values = _values(file, tensor, first, last, kernels)
            share = None if weights is None else weights[expert]
            yield encode(kind, values, share, name=tensor.name, kernels=kernels)


def _per_expert(tensor: GgufTensor, importance: Tensor) -> tuple[int, Tensor]:
    columns = tensor.shape[-1]
    experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
    if importance.numel() != experts * columns:
        raise QuantmillError(
            codes.IMPORTANCE(
                tensor.name,
                f"its importance has {importance.numel()} values, not {experts} x {columns}",
                "compute the importance matrix again, from this model",
            )
        )
    return experts, importance.reshape(experts, columns)
