"""Products of 8-bit floats with 8-bit floats, on devices that compute them (Ada, Hopper, newer).

Activations are scaled by the largest magnitude of a token (``row``), of 128 columns of a token
(``block``), or by a stored number (``tensor``), rounded to E4M3, and multiplied by PyTorch's scaled
product; FBGEMM's takes its place for rows where PyTorch has none. What this machine can do is
tried once, with a small product, and the reason why not is a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from quantmill.forms import Blocks, Channel, Grouping, PerTensor, ScaledFloat
from quantmill_fp8.fbgemm import problem as fbgemm_problem

__all__ = ["Kind", "Product", "kind_of", "plain_activations", "unavailable", "unfit"]

Kind = Literal["tensor", "row", "block"]
TOP = 448.0
BLOCK = 128
_ADA = (8, 9)
_LEAST = 1e-12


def kind_of(grouping: Grouping) -> Kind | None:
    """The scaled product for a weight's grouping, or None where there is none."""
    if isinstance(grouping, PerTensor):
        return "tensor"
    if grouping == Channel(0):
        return "row"
    return "block" if grouping == Blocks(BLOCK, BLOCK) else None


def unfit(form: ScaledFloat) -> str | None:
    """Why a weight's shape or scales fit no scaled product, or None."""
    kind = kind_of(form.grouping)
    if kind is None:
        return f"its scales are by {form.grouping}"
    if form.values.dtype != torch.float8_e4m3fn:
        return f"its values are {form.values.dtype}"
    multiple = BLOCK if kind == "block" else 16
    rows, columns = form.shape
    if rows % multiple or columns % multiple:
        return f"its shape {rows} x {columns} is no multiple of {multiple}"
    return None


@cache
def unavailable(kind: Kind, device: str) -> str | None:
    """Why ``device`` can't compute such products, or None. Tried once per process."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return f"{device} has no products of 8-bit floats"
    have = torch.cuda.get_device_capability(device)
    if have < _ADA:
        return f"they need compute capability 8.9, this device has {have[0]}.{have[1]}"
    size = 2 * BLOCK
    weight = torch.ones(size, size, device=device).to(torch.float8_e4m3fn)
    shape = {"tensor": (), "row": (size,), "block": (2, 2)}[kind]
    grouping: Grouping = {"tensor": PerTensor(), "row": Channel(0)}.get(kind, Blocks(BLOCK, BLOCK))
    form = ScaledFloat(weight, torch.ones(shape, device=device), grouping)
    x = torch.ones(32, size, device=device, dtype=torch.bfloat16)
    try:
        found = Product(form)(x)
        torch.cuda.synchronize(device)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        text = (str(error).splitlines() or [""])[0]
        return f"PyTorch {torch.__version__} refuses them: {text[:160]}"
    if not bool((found == size).all()):
        return f"PyTorch {torch.__version__} computes them wrongly here"
    return None


class Product:
    """``x @ W.T`` with both rounded to 8 bits, for one weight.

    What depends on the weight alone is made once: a small batch takes less time on the device than
    a few more operations take to start.
    """

    def __init__(
        self,
        form: ScaledFloat,
        bound: float | None = None,
        activations: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Args:
        form: a weight ``[out, in]`` that :func:`unfit` has nothing against.
        bound: the largest magnitude that scales are chosen for (``activation_scale_ub``).
        activations: a kernel of that operation; None rounds in plain PyTorch.
        """
        assert isinstance(form.scale, Tensor)
        kind = kind_of(form.grouping)
        assert kind is not None
        self.kind: Kind = kind
        self.bound = bound
        self.activations = activations or plain_activations
        self.weight = form.values.t()
        wide = form.scale.to(torch.float32)
        if kind == "block":
            # The weight's scales lie column by column, each padded to a multiple of four.
            blocks = wide.shape[1]
            wide = functional.pad(wide, (0, -blocks % 4), value=1.0).t()
        self.scale = wide
        """As the product takes it beside activations of its own kind."""
        if kind != "block":
            self.per_output = wide.reshape(1, -1).expand(1, form.shape[0]).contiguous()
            """float32 ``[1, out]``, for tokens that have scales of their own."""

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The product.

        Args:
            x: bfloat16 or float16 ``[..., in]``.
            scale: float, of static activations; None takes it from ``x``.

        Returns:
            ``[..., out]`` in the dtype of ``x``.
        """
        flat = x.reshape(-1, x.shape[-1])
        tokens = flat.shape[0]
        if self.kind == "block":
            # Columns of scales have to begin at multiples of 16 bytes.
            codes, by_token = self.activations(flat, size=BLOCK, rows=-(-tokens // 16) * 16)
            result = _block_mm(codes, self.weight, by_token, self.scale)[:tokens]
        elif scale is not None and self.kind == "tensor":
            one = scale.to(torch.float32)
            codes = _codes(flat.to(torch.float32), one.reshape(1, 1))
            result = _mm(codes, self.weight, one.reshape(()), self.scale.reshape(()), x.dtype)
        else:
            if scale is None:
                codes, by_row = self.activations(flat, bound=self.bound)
            else:
                by_row = scale.to(torch.float32).reshape(1, 1).expand(tokens, 1).contiguous()
                codes = _codes(flat.to(torch.float32), by_row)
            result = _mm(codes, self.weight, by_row, self.per_output, x.dtype)
        return result.to(x.dtype).reshape(*x.shape[:-1], self.weight.shape[1])


def plain_activations(
    x: Tensor, *, size: int | None = None, bound: float | None = None, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The operation ``activations`` of :mod:`quantmill.kernels`, in plain PyTorch."""
    work = functional.pad(x, (0, 0, 0, (rows or x.shape[0]) - x.shape[0])).to(torch.float32)
    if size is None:
        scale = work.abs().amax(dim=1, keepdim=True).clamp(min=_LEAST, max=bound) / TOP
        return _codes(work, scale), scale
    tiles = work.unflatten(1, (-1, size))
    scale = tiles.abs().amax(dim=2).clamp(min=_LEAST, max=bound) / TOP
    return _codes(tiles, scale.unsqueeze(2)).flatten(1), scale.t().contiguous().t()


def _codes(work: Tensor, scale: Tensor) -> Tensor:
    return (work / scale).clamp_(-TOP, TOP).to(torch.float8_e4m3fn)


def _mm(codes: Tensor, weight: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    out = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    try:
        result: Tensor = torch._scaled_mm(
            # Sums stay in the tensor cores (with fewer bits), as the peers' linears have them.
            codes,
            weight,
            scale_a=first,
            scale_b=second,
            out_dtype=out,
            use_fast_accum=True,
        )
    except (RuntimeError, ValueError):
        if codes.device.type != "cuda" or first.ndim != 2 or fbgemm_problem() is not None:
            raise
        import fbgemm_gpu.experimental.gen_ai  # noqa: F401 registers the operators

        operator: Any = torch.ops.fbgemm.f8f8bf16_rowwise
        result = operator(codes, weight.t(), first.reshape(-1), second.reshape(-1))
    return result


def _block_mm(codes: Tensor, weight: Tensor, by_token: Tensor, scale: Tensor) -> Tensor:
    from torch.nn.functional import ScalingType, scaled_mm

    result: Tensor = scaled_mm(
        codes,
        weight,
        by_token,
        ScalingType.BlockWise1x128,
        scale,
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return result
