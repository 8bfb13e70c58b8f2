"""Matmul over odd shapes, every kind of form and every level, without room around any tensor.

Run as a program by test_matmul_sanitized.py with a library that was built with sanitizers (its
path is the argument); prints the levels that were run. The second argument says which cases:
``all`` or ``some``; ``overflow`` makes a mistake on purpose: a result that is too short.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill.forms import Channel, Flat, Form, Group, PerTensor
from quantmill_cpu import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (1, 2, 3, 4, 5, 17, 33, 130)
SHAPES = ((1, 1), (1, 16), (17, 33), (31, 48), (33, 127), (48, 300), (64, 544))


def load_forms() -> Any:
    path = Path(__file__).with_name("matmul_forms.py")
    spec = importlib.util.spec_from_file_location("matmul_forms", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["matmul_forms"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_forms(forms: Any, every: int) -> Iterator[Form]:
    seed = 0
    for shape in SHAPES:
        for bits in forms.BITS:
            for grouping in (Group(16), Group(32), Group(48), Channel(0), PerTensor()):
                seed += 1
                if seed % every:
                    continue
                make = forms.Make(seed)
                offset = ("none", "zero", "minimum")[seed % 3]
                packing = "i8" if offset == "none" else "dense"
                order = seed % 4 == 0
                yield make.affine(
                    shape, bits, grouping, offset=offset, packing=packing, act_order=order
                )
                table = torch.logspace(-3, 0, 2**bits) if seed % 2 else None
                yield make.codebook(shape, bits, grouping, packing="dense", table=table)
    for rows in (1, 15, 35):
        yield forms.Make(rows).codebook((rows, 96), 4, Flat(32), nested=True)
    yield from forms.various(forms.Make(1)).values()


def unaligned(tensor: Tensor) -> Tensor:
    """The same values at an odd address, with nothing behind them."""
    raw = bytearray(tensor.numel() * tensor.itemsize + 1)
    apart = torch.frombuffer(raw, dtype=tensor.dtype, offset=1, count=tensor.numel())
    return apart.copy_(tensor.reshape(-1)).reshape(tensor.shape)


def mistake(forms: Any) -> None:
    live = forms.prepared(forms.Make(1).affine((64, 64), 4, Group(32)))
    x, y = torch.randn(1, 64), torch.empty(60)
    weight = live.tensors["weight"]
    native.library().qm_matmul(weight.data_ptr(), x.data_ptr(), None, y.data_ptr(), 0, 1, 1)


def main(library: str, cases: str) -> None:
    torch.set_num_threads(2)
    native._FILE = Path(library)
    from quantmill_cpu.dequantize import dequantize
    from quantmill_cpu.matmul import matmul

    forms = load_forms()
    if cases == "overflow":
        mistake(forms)
    found = list(all_forms(forms, 1 if cases == "all" else 13))
    for number, level in enumerate(native.matmul_levels()):
        native.use_matmul_level(level)
        for index, form in enumerate(found):
            given = form.map_tensors(unaligned) if index % 3 == 0 else form
            live, weight = forms.prepared(given), form.dequantize(torch.float32)
            assert forms.same(live.restore(), form)
            for turn in range(3):
                dtype = DTYPES[(index + turn) % 3]
                assert forms.expanded(dequantize(live, dtype), form), f"{level} {form}"
                batch = BATCHES[(index + 3 * turn + number) % len(BATCHES)]
                x = torch.randn(batch, form.shape[1], dtype=dtype)
                bias = unaligned(torch.randn(form.shape[0], dtype=dtype)) if turn else None
                wrong = forms.error(matmul(unaligned(x), live, bias), x, weight, bias)
                # How near results are is test_matmul.py's question; a few weights tell little.
                assert wrong < 0.01 or dtype == torch.float16, f"{level} {batch} {form}: {wrong}"
        print(level)


if __name__ == "__main__":
    main(*sys.argv[1:])
