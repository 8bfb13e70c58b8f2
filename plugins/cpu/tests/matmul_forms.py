"""Forms of every kind that the matmul kernels take, and how far a result is from the exact one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantmill.forms import (
    Affine,
    Blocks,
    Channel,
    Codebook,
    Codes,
    Flat,
    Form,
    Group,
    Grouping,
    PerTensor,
    ScaledFloat,
)
from quantmill.kernels import Prepared
from quantmill.registrations import Kernel

BITS = (1, 2, 3, 4, 5, 6, 8)
KERNEL = Kernel(
    "cpu-matmul",
    "matmul",
    "any",
    "quantmill_cpu.matmul:matmul",
    layout="cpu-panels",
    prepare="quantmill_cpu.matmul:prepare",
    restore="quantmill_cpu.matmul:restore",
    bind="quantmill_cpu.matmul:bind",
)
NARROW = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The largest relative error of one rounding to a dtype."""


@dataclass(frozen=True)
class Make:
    """Makes forms of random codes; all that it draws depends on the seed."""

    seed: int

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator()) + 0.1

    def codes(self, shape: tuple[int, ...], bits: int, packing: str) -> Codes:
        values = torch.randint(0, 2**bits, shape, generator=self._generator())
        if packing == "i8":
            values = values - 2 ** (bits - 1)
            return Codes(values.to(torch.int8), bits, shape, "i8")
        return Codes.pack(values.to(torch.uint8), bits, packing, pad=7)

    def affine(
        self,
        shape: tuple[int, int],
        bits: int,
        grouping: Grouping,
        *,
        packing: str = "dense",
        offset: str = "zero",
        scale_dtype: torch.dtype = torch.float16,
        offset_dtype: torch.dtype = torch.uint8,
        act_order: bool = False,
    ) -> Affine:
        groups = grouping.scale_shape(shape)
        middle = 0.0 if packing == "i8" else 2.0 ** (bits - 1)
        values = None
        if offset == "zero":
            drawn = middle + 3 * (self.rand(*groups) - 0.6)
            values = drawn.round().clamp(0) if not offset_dtype.is_floating_point else drawn
        elif offset == "minimum":
            values = -self.rand(*groups) * 2.0 ** (bits - 1)
        index = None
        if act_order and isinstance(grouping, Group):
            order = torch.randperm(shape[1], generator=self._generator())
            index = torch.empty(shape[1], dtype=torch.int32)
            index[order] = (torch.arange(shape[1]) // grouping.size).to(torch.int32)
        return Affine(
            self.codes(shape, bits, packing),
            self.rand(*groups).to(scale_dtype),
            grouping,
            None if values is None else values.to(offset_dtype),
            offset,
            group_index=index,
            factor=0.25 if self.seed % 2 else 1.0,
        )

    def codebook(
        self,
        shape: tuple[int, int],
        bits: int,
        grouping: Grouping,
        *,
        packing: str = "hi4",
        table: Tensor | None = None,
        nested: bool = False,
    ) -> Codebook:
        if table is None:
            table = torch.randn(2**bits, generator=self._generator()).sort().values
        groups = grouping.scale_shape(shape)
        plain = self.rand(*groups)
        scale: Tensor | Codebook = plain
        if nested:
            count = plain.numel()
            entries = torch.linspace(-1, 1, 256)
            scale = Codebook(
                self.codes((count,), 8, "u8"),
                entries,
                self.rand(-(-count // 256)),
                Flat(256),
                offset=torch.tensor(1.5),
            )
        codes = self.codes(shape, bits, packing)
        return Codebook(codes, table, scale, grouping, table_name="test")

    def float8(self, shape: tuple[int, ...], dtype: torch.dtype, grouping: Grouping) -> ScaledFloat:
        weight = torch.randn(shape, generator=self._generator())
        return ScaledFloat.quantize(weight, dtype, grouping)


def nested_affine(shape: tuple[int, int], make: Make) -> Affine:
    """As Q4_K: scales and minimums of 6 bits with a second scale for 8 of them."""
    form = make.affine(shape, 4, Group(32), offset="minimum")
    groups = Group(32).scale_shape(shape)
    offset = _level(make, groups, 6, "u8", 8, torch.bfloat16)
    return replace(
        form,
        scale=_level(make, groups, 6, "dense", 8, torch.float16),
        offset=replace(offset, factor=-0.2),
    )


def nested_signed(shape: tuple[int, int], make: Make, bits: int) -> Affine:
    """As Q6_K: signed scales for 16 columns, and one zero point."""
    form = make.affine(shape, bits, Group(16), offset="none", packing="dense")
    groups = Group(16).scale_shape(shape)
    zero = torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8)
    scale = _level(make, groups, 8 if bits > 3 else 6, "i8", 16, torch.float32)
    return replace(form, scale=scale, offset=zero, offset_kind="zero")


def _level(
    make: Make, shape: tuple[int, ...], bits: int, packing: str, size: int, dtype: torch.dtype
) -> Affine:
    second = make.rand(*Group(size).scale_shape(shape)).to(dtype)
    return Affine(make.codes(shape, bits, packing), second, Group(size), factor=1 / 32)


def various(make: Make) -> dict[str, Form]:
    """Forms apart from the plain ones, by what is special about them."""
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    tiny = Make.codebook(make, (20, 96), 4, Group(32))
    with_offset = replace(tiny, offset=torch.tensor(-0.4))
    scaled = make.codebook((20, 96), 4, Group(32))
    groups = Group(32).scale_shape((20, 96))
    mx = ScaledFloat(
        make.float8((20, 96), e4, PerTensor()).values,
        torch.randint(120, 130, groups, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        Group(32),
    )
    nvfp4 = replace(scaled, scale=make.float8(groups, e4, PerTensor()))
    return {
        "codebook with an offset": with_offset,
        "whole table": make.codebook((33, 64), 4, Flat(64), table=torch.arange(16) ** 2 - 99.0),
        "table over orders of magnitude": make.codebook(
            (33, 64), 4, Group(16), table=torch.logspace(-8, 0, 16)
        ),
        "nested": make.codebook((40, 256), 4, Flat(64), nested=True),
        "nested, odd rows": make.codebook((37, 320), 4, Flat(64), nested=True, packing="dense"),
        "nested affine": nested_affine((35, 256), make),
        "nested affine, ragged": nested_affine((3, 96), make),
        "nested, signed": nested_signed((35, 512), make, 6),
        "nested, signed, ragged": nested_signed((17, 592), make, 3),
        "nested, blocks across rows": make.codebook((37, 64 * 43), 4, Flat(64), nested=True),
        "one zero point": replace(
            make.affine((20, 96), 4, Group(32)), offset=torch.full((20, 3), 8)
        ),
        "one float zero point": replace(
            make.affine((20, 96), 4, Group(32)), offset=torch.full((20, 3), 7.3)
        ),
        "nvfp4": nvfp4,
        "mxfp8": mx,
        "codebook of 8 bits": make.codebook((20, 96), 8, Group(32), packing="u8"),
        "codebook in blocks": make.codebook((40, 96), 8, Blocks(16, 32), packing="u8"),
        "codebook of 3 bits": make.codebook((20, 96), 3, Channel(0), packing="dense"),
        "codebook of 6 bits": make.codebook((20, 96), 6, PerTensor(), packing="dense"),
        "float64 scales": make.affine((20, 96), 4, Group(32), scale_dtype=torch.float64),
        "int32 zeros": make.affine((20, 96), 4, Group(32), offset_dtype=torch.int32),
        "int64 zeros": make.affine((20, 96), 4, Group(32), offset_dtype=torch.int64),
        "float zeros": make.affine((20, 96), 3, Group(48), offset_dtype=torch.bfloat16),
        **{
            f"{dtype} {grouping}": make.float8((45, 200), dtype, grouping)
            for dtype in (e4, e5)
            for grouping in (
                PerTensor(),
                Channel(0),
                Group(32),
                Group(48),
                Blocks(16, 64),
                Blocks(128, 128),
                Blocks(5, 16),
            )
        },
    }


def error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The relative error in the Frobenius norm against float64, without what the rounding of the
    result to its dtype may cost. Sums that happen to be near zero are measured by what they are
    usually."""
    exact = x.double() @ weight.double().T
    usual = x.double().norm() * weight.double().norm() / max(1, weight.shape[1]) ** 0.5
    # Weights that are all zero as differences of numbers are so to float32's precision.
    size = max(exact.norm().item(), usual.item(), 1e-4 * x.double().norm().item(), 1e-300)
    if bias is not None:
        exact = exact + bias.double()
    wrong = (y.double() - exact).norm() - NARROW[y.dtype] * exact.norm()
    return float(max(0.0, wrong.item()) / size)


def expanded(found: Tensor, form: Form) -> bool:
    """Whether these are the form's values in the tensor's dtype, up to float32's precision; to the
    bit where they are differences of whole numbers, scaled."""
    wanted = form.dequantize(found.dtype)
    if isinstance(form, Affine) and form.offset_kind != "minimum" and form.factor == 1.0:
        scale = form.scale if isinstance(form.scale, Tensor) else None
        if scale is not None and not isinstance(form.offset, Form):
            return bool(torch.equal(found, wanted))
    size = 1e-5 * float(wanted.double().nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(
        found.double(), wanted.double(), rtol=2 * NARROW[found.dtype], atol=size, equal_nan=True
    )


def same(left: Form, right: Form) -> bool:
    """Whether all tensors are equal bit for bit, with dtype and shape."""
    ours, theirs = left.tensors(), right.tensors()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype
        and ours[name].shape == tensor.shape
        and torch.equal(
            ours[name].contiguous().reshape(-1).view(torch.uint8),
            tensor.contiguous().reshape(-1).view(torch.uint8),
        )
        for name, tensor in theirs.items()
    )


def prepared(form: Form) -> Prepared:
    return Prepared.of(KERNEL, form)
