"""Many weights in one call: what each one's own call gives, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from quantmill.forms import Affine, Channel, Codebook, Codes, Flat, Form, Group
from quantmill.kernels import Prepared
from quantmill.registrations import resolve
from quantmill_cpu.matmul import bind_grouped, grouped_matmul, matmul
from quantmill_cpu.plugin import quantmill_kernels

KERNELS = {kernel.name: kernel for kernel in quantmill_kernels()}
TABLE = torch.linspace(-1, 1, 16) ** 3


def affine(seed: int) -> Form:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(seed))
    return Affine.quantize(weight, 4, Group(32), scale_dtype=torch.float16)


def nested(seed: int) -> Form:
    generator = torch.Generator().manual_seed(seed)
    count = 70 * 64 // 64
    inner = Codes(
        torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8), 8, (count,), "u8"
    )
    scale = Codebook(
        inner, torch.linspace(-1, 1, 256), torch.rand(1), Flat(256), offset=torch.tensor(1.5)
    )
    codes = Codes.empty((70, 64), 4, "hi4")
    codes.data.random_(0, 256, generator=generator)
    return Codebook(codes, TABLE, scale, Flat(64))


def rows_int8(seed: int) -> Form:
    codes = Codes.empty((33, 48), 8, "i8")
    codes.data.random_(-127, 128, generator=torch.Generator().manual_seed(seed))
    return Affine(codes, torch.rand(33), Channel(0), factor=1 / 127)


def stacked(name: str, forms: list[Form]) -> tuple[Prepared, list[Prepared]]:
    kernel = KERNELS[f"cpu-matmul-{name}"]
    each = [Prepared.of(kernel, form) for form in forms]
    tensors = {key: torch.stack([live.tensors[key] for live in each]) for key in each[0].tensors}
    return Prepared(kernel, each[0].skeleton, tensors), each


def one_by_one(x: Tensor, ends: list[int], each: list[Prepared], bias: Tensor | None) -> Tensor:
    parts, start = [], 0
    for index, (end, live) in enumerate(zip(ends, each, strict=True)):
        if end > start:
            own = None if bias is None else bias[index]
            parts.append(matmul(x[start:end], live, own))
        start = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, each[0].skeleton.shape[0])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "make"), [("affine", affine), ("codebook", nested), ("affine", rows_int8)]
)
def test_the_same_as_one_call_for_each(name: str, make: Any, dtype: torch.dtype) -> None:
    live, each = stacked(name, [make(seed) for seed in range(5)])
    rows, columns = live.skeleton.shape
    for ends in ([3, 3, 4, 40, 41], [0, 0, 0, 0, 0], [0, 0, 0, 0, 44], [1, 2, 3, 4, 5]):
        x = torch.randn(44, columns).to(dtype)
        for bias in (None, torch.randn(5, rows).to(dtype)):
            found = grouped_matmul(x, torch.tensor(ends), live, bias)
            assert torch.equal(found, one_by_one(x, ends, each, bias))
    nothing = grouped_matmul(x[:0], torch.zeros(5, dtype=torch.int64), live, None)
    assert nothing.shape == (0, rows)


def test_a_compiled_graph_has_it_as_one_operator() -> None:
    live, _ = stacked("affine", [affine(seed) for seed in range(4)])
    bound: Any = bind_grouped(live)
    x = torch.randn(9, 96, dtype=torch.bfloat16)
    ends = torch.tensor([2, 2, 7, 9])
    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ends, None), bound(x, ends, None))


def test_it_is_copied_and_pickled() -> None:
    live, _ = stacked("affine", [affine(seed) for seed in range(2)])
    bound: Any = bind_grouped(live)
    x, ends = torch.randn(3, 96, dtype=torch.bfloat16), torch.tensor([1, 3])
    again = pickle.loads(pickle.dumps(bound))
    for twin in (copy.deepcopy(bound), again):
        assert torch.equal(twin(x, ends, None), bound(x, ends, None))


def test_what_does_not_fit_is_refused() -> None:
    live, _ = stacked("affine", [affine(seed) for seed in range(2)])
    x, ends = torch.randn(3, 96, dtype=torch.bfloat16), torch.tensor([1, 3])
    for wrong in (
        (x[:, :90], ends, live, None),
        (x, ends.int(), live, None),
        (x, ends[:1], live, None),
        (x, ends, live, torch.zeros(2, 70)),
    ):
        with pytest.raises(ValueError, match="must"):
            grouped_matmul(*wrong)
    kernel = KERNELS["cpu-matmul-affine"]
    plain = Affine.quantize(torch.randn(8, 20), 4, Group(10))
    assert bind_grouped(Prepared.of(kernel, plain)) is None


def test_each_grouped_kernel_reads_the_layout_of_a_matmul() -> None:
    for kernel in KERNELS.values():
        if kernel.operation == "grouped_matmul":
            one = KERNELS[kernel.name.replace("grouped", "matmul")]
            assert (one.layout, one.constraints) == (kernel.layout, kernel.constraints)
            assert callable(resolve(kernel.implementation)) and kernel.bind is not None
