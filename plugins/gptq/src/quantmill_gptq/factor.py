"""The factor of a Hessian that GPTQ compensates errors by."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare

__all__ = ["EXACT", "inverse_factor"]

SINGULAR = declare("QM-GPTQ-003", "A Hessian stays singular whatever the damping")
EXACT = 4096
"""Widest Hessian that is factored in float64."""
_LEAF = 256


def inverse_factor(
    hessian: Tensor, damp: float, increment: float, name: str
) -> tuple[Tensor, Tensor, float]:
    """The upper Cholesky factor ``U`` of the inverse, ``inv(H) = U.T @ U``, its inverse ``V``, of
    which ``H = V @ V.T``, and the damping used.

    Columns of zero energy must have a one on the diagonal already. The damping grows until the
    damped Hessian is positive definite.

    Raises:
        QuantmillError: the damping reached 1 and H is still not positive definite.
    """
    mean = hessian.diagonal().mean()
    dtype = torch.float64 if hessian.shape[0] <= EXACT else torch.float32
    while damp < 1.0:
        # Backwards, for H = V @ V.T with V upper: then U is the inverse of V, and neither the
        # inverse of H nor a second factorisation is needed.
        damped = hessian.flip(0, 1).to(dtype)
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            root = lower.flip(0, 1)
            upper = _inverted(root)
            if bool(torch.isfinite(upper).all()):
                return upper.to(torch.float32), root.to(torch.float32), damp
        damp += max(increment, 0.01)
    raise QuantmillError(
        SINGULAR(
            name,
            "its inputs are degenerate: all tokens alike, or far beyond float32",
            "calibrate with more and more varied text",
        )
    )


def _inverted(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves."""
    size = upper.shape[0]
    if size <= _LEAF:
        unit = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, unit, upper=True)
    half = size // 2
    made = torch.zeros_like(upper)
    first, last = _inverted(upper[:half, :half]), _inverted(upper[half:, half:])
    made[:half, :half], made[half:, half:] = first, last
    made[:half, half:] = (first @ (upper[:half, half:] @ last)).neg_()
    return made
