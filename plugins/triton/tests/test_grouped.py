"""Many weights in one launch: each row's product with its own, the others' rows zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quantmill.forms import Affine, Blocks, Channel, Codebook, Form, Group, ScaledFloat
from quantmill.kernels import Prepared
from quantmill.registrations import resolve
from quantmill_triton.plugin import quantmill_kernels

TABLE = torch.linspace(-1, 1, 16) ** 3
ENDS = {
    "few": [0, 1, 1, 3, 4],
    "uneven": [2, 21, 21, 40, 41],
    "one": [0, 0, 0, 0, 30],
    "none": [0, 0, 0, 0, 0],
}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reordered(seed: int) -> Form:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    form = Affine.quantize(random(seed, 70, 300), 4, Group(64))
    return replace(form, group_index=(torch.arange(300) // 64)[order])


FORMS: dict[str, Any] = {
    "zeros": lambda seed: Affine.quantize(
        random(seed, 70, 300), 4, Group(64), scale_dtype=torch.float16
    ),
    "two planes": lambda seed: Affine.quantize(random(seed, 70, 300), 3, Group(64)),
    "minima": lambda seed: Affine.quantize(random(seed, 70, 300), 4, Group(64), offset="minimum"),
    "rows": lambda seed: Affine.quantize(random(seed, 70, 300), 8, Channel(0), symmetric=True),
    "table": lambda seed: Codebook.quantize(
        random(seed, 70, 256), TABLE, 64, bits=4, packing="hi4"
    ),
    "float8": lambda seed: ScaledFloat.quantize(
        random(seed, 130, 256), torch.float8_e4m3fn, Blocks(128, 128)
    ),
    "act-order": reordered,
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_meet_their_own_weight(name: str, device: str) -> None:
    forms = [FORMS[name](seed).to(device) for seed in range(5)]
    traits = forms[0].traits()
    fitting = {
        kernel.operation: kernel
        for kernel in quantmill_kernels()
        if kernel.form == forms[0].kind
        and all(traits.get(fact) in ok for fact, ok in kernel.constraints.items())
    }
    each = [Prepared.of(fitting["matmul"], form) for form in forms]
    assert "codes" in each[0].tensors, "kept plain"
    tensors = {key: torch.stack([live.tensors[key] for live in each]) for key in each[0].tensors}
    many = resolve(fitting["grouped_matmul"].implementation)
    weights = [form.dequantize(torch.float32).double() for form in forms]
    rows, columns = forms[0].shape
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    for ends in ENDS.values():
        x = random(1, 41, columns).to(device, dtype)
        bias = random(2, 5, rows).to(device, dtype)
        result = many(
            x,
            torch.tensor(ends, device=device),
            Prepared(each[0].kernel, each[0].skeleton, tensors),
            bias,
        )
        assert result.shape == (41, rows) and result.dtype == dtype
        start = 0
        for index, end in enumerate(ends):
            wanted = x[start:end].double() @ weights[index].t() + bias[index].double()
            error = (result[start:end].double() - wanted).norm() / wanted.norm().clamp(min=1e-9)
            assert end == start or float(error) < 6e-3, (ends, index)
            start = end
        assert not result[start:].any()


def test_unlike_tables_are_not_taken_together(device: str) -> None:
    forms = [
        Codebook.quantize(random(0, 64, 64), table, 64, bits=4, packing="hi4")
        for table in (TABLE, TABLE * 2)
    ]
    kernel = next(item for item in quantmill_kernels() if item.name == "triton-grouped-codebook")
    each = [
        Prepared.of(
            next(k for k in quantmill_kernels() if k.name == "triton-matmul-codebook"), form
        )
        for form in forms
    ]
    tensors = {key: torch.stack([live.tensors[key] for live in each]) for key in each[0].tensors}
    assert kernel.bind is not None
    assert resolve(kernel.bind)(Prepared(each[0].kernel, each[0].skeleton, tensors)) is None
