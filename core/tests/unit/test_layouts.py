"""Live layouts: a kernel prepares the weight, the form is freed, the codec still gives it back."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantmill.backend import Codec
from quantmill.forms import Affine, Channel, Codes, Form
from quantmill.kernels import KernelRegistry, Prepared
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill.registrations import Kernel

CALLS: list[str] = []


def prepare(form: Form) -> dict[str, Tensor]:
    """Transpose the codes, and keep the scales in 16 bits beside the exact ones."""
    assert isinstance(form, Affine) and isinstance(form.scale, Tensor)
    return {
        "codes": form.codes.data.t().contiguous(),
        "scale": form.scale,
        "fast": form.scale.to(torch.bfloat16),
    }


def restore(tensors: Mapping[str, Tensor], skeleton: Form) -> Form:
    assert isinstance(skeleton, Affine)
    codes = Codes(tensors["codes"].t().contiguous(), 8, skeleton.shape, "i8")
    return Affine(codes, tensors["scale"], skeleton.grouping, dtype=skeleton.dtype)


def matmul(x: Tensor, live: Prepared, bias: Tensor | None) -> Tensor:
    CALLS.append(f"{x.shape[0]} rows")
    out = (x.float() @ live.tensors["codes"].float()) * live.tensors["scale"]
    return (out if bias is None else out + bias).to(x.dtype)


class PlainCodec(Codec[Any]):
    """Codes and scales as they are."""

    suffixes = ("weight", "scale")

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine) and isinstance(form.scale, Tensor)
        return {"weight": form.codes.data, "scale": form.scale}

    def decode(self, tensors: Any, target: Any, dtype: torch.dtype) -> Form:
        raise NotImplementedError

    def describe(self, headers: Any, target: Any, dtype: torch.dtype) -> Form | None:
        return None


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> KernelRegistry:
    module = types.ModuleType("layout_kernels")
    vars(module).update(prepare=prepare, restore=restore, matmul=matmul)
    monkeypatch.setitem(sys.modules, "layout_kernels", module)
    CALLS.clear()

    def kernel(name: str, max_rows: int | None, cost: float) -> Kernel:
        return Kernel(
            name,
            "matmul",
            "affine",
            "layout_kernels:matmul",
            dtypes=("float32",),
            cost=cost,
            max_rows=max_rows,
            layout="columns",
            prepare="layout_kernels:prepare",
            restore="layout_kernels:restore",
        )

    return KernelRegistry([kernel("one-row", 1, 0.1), kernel("some-rows", 4, 0.2)])


@pytest.fixture
def form() -> Affine:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (6, 10), generator=generator, dtype=torch.int8)
    return Affine(Codes(codes, 8, (6, 10), "i8"), torch.rand(6, generator=generator), Channel(0))


@pytest.fixture
def linear(form: Affine, registry: KernelRegistry) -> FormLinear:
    return FormLinear(form, torch.ones(6), PlainCodec(None), registry, "float32")


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_kernels_of_the_layout_or_the_reference_compute_the_same(
    rows: int, linear: FormLinear, form: Affine
) -> None:
    x = torch.randn(rows, 10)
    torch.testing.assert_close(linear(x), form.matmul(x, torch.ones(6)))
    assert ([f"{rows} rows"] if rows <= 4 else []) == CALLS


def test_the_form_comes_back_exactly_and_is_what_is_saved(linear: FormLinear, form: Affine) -> None:
    linear(torch.randn(1, 10))
    for name, tensor in linear.form.tensors().items():
        assert torch.equal(tensor, form.tensors()[name])
    state = linear.state_dict()
    assert set(state) == {"weight", "scale", "bias"}
    assert torch.equal(state["weight"], form.codes.data)
    assert torch.equal(linear.to(torch.bfloat16).form.codes.data, form.codes.data)
    assert linear.form.tensors()["scale"].dtype == torch.float32


def test_the_live_bytes_are_planned_and_real(
    linear: FormLinear, form: Affine, registry: KernelRegistry
) -> None:
    factory = FormLinearFactory(None, PlainCodec(None), registry, dtype="float32")
    assert factory.resident_bytes(form.to("meta")) == linear.live_bytes == 60 + 24 + 12


def test_gradients_reach_the_input(linear: FormLinear, form: Affine) -> None:
    x = torch.randn(3, 10, requires_grad=True)
    linear(x).sum().backward()
    expected = form.dequantize(torch.float32).sum(0).expand(3, 10)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    assert CALLS == ["3 rows"]  # by the kernel; the weight is dequantized for the way back


def test_a_disabled_kernel_prepares_nothing(form: Affine, registry: KernelRegistry) -> None:
    off = KernelRegistry(registry.kernels, disable=["one-row"])
    linear = FormLinear(form, None, PlainCodec(None), off, "float32")
    linear(torch.randn(1, 10))
    assert linear.live_bytes == 60 + 24 + 12, "the other kernel of the layout serves one row too"
    none = KernelRegistry(registry.kernels, disable=["one-row", "some-rows"])
    plain = FormLinear(form, None, PlainCodec(None), none, "float32")
    assert plain.live_bytes == form.nbytes


def test_a_kernel_of_the_layout_dequantizes_for_the_way_back(
    form: Affine, registry: KernelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def floats(live: Prepared, dtype: torch.dtype) -> Tensor:
        CALLS.append(f"floats of {live.kernel.layout}")
        return live.restore().dequantize(dtype)

    monkeypatch.setattr(sys.modules["layout_kernels"], "floats", floats, raising=False)
    expander = replace(
        registry.kernels[0],
        name="floats",
        operation="dequantize",
        implementation="layout_kernels:floats",
        max_rows=None,
    )
    kernels = KernelRegistry([*registry.kernels, expander])
    linear = FormLinear(form, None, PlainCodec(None), kernels, "float32")
    x = torch.randn(2, 10, requires_grad=True)
    linear(x).sum().backward()
    assert CALLS == ["2 rows", "floats of columns"]
    assert torch.equal(linear.dequantized(torch.float32), form.dequantize(torch.float32))
    linear.keep(form)
    assert torch.equal(linear.dequantized(torch.float32), form.dequantize(torch.float32))
    assert len(CALLS) == 3
