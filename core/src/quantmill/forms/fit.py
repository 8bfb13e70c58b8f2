"""Fitting a form into what a layout can hold: the same values, or the reason why not.

A codec's :meth:`~quantmill.backend.Codec.fit` is made of these functions. "The same values" are
equal float32 numbers of ``dequantize``. Forms on the meta device are taken too: what only data can
tell is noted as a condition then, and the answer holds unless one of them is met.

What may change without changing a value: how codes are packed, their width (3-bit codes in 4 bits),
signed for unsigned codes, a shift of codes and zero points alike, smaller groups with repeated
scales, scales of another dtype that holds the same numbers, nested scales as plain ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantmill.findings import QuantmillError
from quantmill.forms import steps
from quantmill.forms.affine import Affine
from quantmill.forms.base import Form
from quantmill.forms.convert import group_words, kind_words, not_exact, regroup
from quantmill.forms.grouping import Grouping
from quantmill.forms.scaled_float import ScaledFloat
from quantmill.forms.steps import Conditions, Zeros

__all__ = ["Conditions", "Zeros", "fit_floats", "fit_integers", "fit_scale", "is_symmetric"]


def fit_integers(
    form: Form,
    *,
    bits: Sequence[int],
    zeros: Zeros,
    scales: Sequence[torch.dtype],
    size: int | None = None,
    ordered: bool = False,
    positive: bool = False,
    packing: str = "dense",
    seen: Conditions | None = None,
) -> Affine:
    """An affine form ``[out, in]`` in groups of columns, as a layout of these kinds holds it.

    Args:
        form: any form.
        bits: widths of codes that the layout has; the smallest that serves is taken. Signed ones
            always have 8.
        zeros: where it has zero points.
        scales: dtypes of scales that it has, the preferred one first; the form's own if possible.
        size: columns per group, None for those of the form.
        ordered: the layout has a group index (act-order).
        positive: the layout has no negative scales: codes and zero points of such groups are
            mirrored. What can't be (groups with a minimum) keeps them.
        packing: of the codes in the result; ``signed`` zeros always give ``i8``.
        seen: takes conditions and notes.

    Returns:
        Grouping ``Group``, scale ``[out, groups]``, offset of that shape (uint8 for ``integer``
        and ``middle``, None for ``signed``), no factor.

    Raises:
        QuantmillError: ``QM-FORM-001``, a value would change; the cause says why.
    """
    seen = seen if seen is not None else Conditions()
    even = steps.ordered(steps.grouped(steps.even(form, seen), size), ordered, seen)
    if positive:
        even = steps.mirrored(even, zeros, seen)
    scale = fit_scale(steps.tensor_of(even.scale), scales, seen)
    even = replace(even, scale=scale)
    if zeros == "float" and even.offset_kind == "zero" and steps.is_float(even.offset):
        offset = steps.narrowed(steps.tensor_of(even.offset), scale.dtype, "zero points", seen)
        return replace(steps.width(even, bits, seen), offset=offset).with_packing(packing)
    if zeros == "minimum" and even.offset_kind == "minimum":
        offset = steps.narrowed(steps.tensor_of(even.offset), scale.dtype, "minima", seen)
        return replace(steps.width(even, bits, seen), offset=offset).with_packing(packing)
    signed = steps.signed_codes(even)
    points = steps.integer_zeros(even, seen)
    if zeros == "minimum":
        return steps.with_minimum(even, signed, points, bits, packing, seen)
    if zeros == "signed":
        bits = (8,)
    refusal: QuantmillError | None = None
    for width in sorted(item for item in bits if item >= even.codes.bits):
        try:
            found = steps.at_width(even, points, width, zeros, packing, seen)
        except QuantmillError as error:
            refusal = refusal or error
            continue
        if width != even.codes.bits:
            seen.note(f"codes of {even.codes.bits} bits are stored in {width}")
        return found
    raise refusal or not_exact(
        "affine", f"its codes have {even.codes.bits} bits, and the layout has {steps.listed(bits)}"
    )


def is_symmetric(form: Affine) -> bool:
    """Whether every zero point of a form with integer ones is the middle code. A form without
    data is taken for symmetric only where it has no zero points."""
    if form.offset is None:
        return True
    if form.offset_kind != "zero" or isinstance(form.offset, Form) or form.offset.is_meta:
        return False
    return bool((form.offset == 2 ** (form.codes.bits - 1)).all())


def fit_floats(
    form: Form,
    *,
    values: Sequence[torch.dtype],
    scales: Sequence[torch.dtype],
    grouping: Grouping | None = None,
    seen: Conditions | None = None,
) -> ScaledFloat:
    """A scaled float form with values, scales and groups that a layout has.

    Args:
        form: any form.
        values: dtypes of values.
        scales: dtypes of scales, as in :func:`fit_integers`.
        grouping: the groups to have, None for those of the form.
        seen: takes conditions and notes.

    Raises:
        QuantmillError: ``QM-FORM-001``, a value would change; the cause says why.
    """
    seen = seen if seen is not None else Conditions()
    if not isinstance(form, ScaledFloat):
        raise not_exact(form.kind, f"it holds {kind_words(form)}, the layout narrow floats")
    plain = ScaledFloat(form.values, form.scale, form.grouping, form.dtype)
    steps.drop_extras(form, plain, seen)
    if plain.values.dtype not in values:
        raise not_exact("scaled_float", f"its values are {steps.dtype_name(plain.values.dtype)}")
    if isinstance(plain.scale, Form):
        plain = replace(plain, scale=steps.flat_scale(plain.scale))
    if grouping is not None and grouping != plain.grouping:
        plain = regroup(plain, grouping)
        seen.note(f"scales are repeated for {group_words(grouping)}")
    return replace(plain, scale=fit_scale(steps.tensor_of(plain.scale), scales, seen))


def fit_scale(scale: Tensor, dtypes: Sequence[torch.dtype], seen: Conditions) -> Tensor:
    """The same numbers in the scale's own dtype, or in the first of ``dtypes`` that has them all.

    Raises:
        QuantmillError: ``QM-FORM-001``, none has.
    """
    if scale.dtype in dtypes:
        return scale
    for dtype in dtypes:
        if scale.is_meta:
            if not steps.holds_all(dtype, scale.dtype):
                seen.unless.append(f"a scale is not exact in {steps.dtype_name(dtype)}")
            return scale.to(dtype)
        narrow = scale.to(dtype)
        if torch.equal(narrow.to(torch.float32), scale.to(torch.float32)):
            return narrow
    raise not_exact(
        "scale",
        f"its scales are {steps.dtype_name(scale.dtype)}, and not all of them are exact in"
        f" {' or '.join(steps.dtype_name(dtype) for dtype in dtypes)}",
    )
