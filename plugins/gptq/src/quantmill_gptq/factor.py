"""The factor of a Hessian that GPTQ compensates errors by."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare

__all__ = ["EXACT", "inverse", "root_of"]

SINGULAR = declare("QM-GPTQ-003", "A Hessian stays singular whatever the damping")
EXACT = 4096
"""Widest Hessian that is factored in float64."""


def root_of(hessian: Tensor, damp: float, increment: float, name: str) -> tuple[Tensor, float]:
    """The upper triangular ``V``, float32 ``[in, in]``, of which ``H = V @ V.T`` with the damping
    that is given too.

    Columns of zero energy must have a one on the diagonal already. The damping grows until the
    damped Hessian is positive definite.

    Raises:
        QuantmillError: the damping reached 1 and H is still not positive definite.
    """
    mean = hessian.diagonal().mean()
    dtype = torch.float64 if hessian.shape[0] <= EXACT else torch.float32
    while damp < 1.0:
        # Backwards: V's inverse is then the factor U of the inverse, inv(H) = U.T @ U.
        damped = hessian.flip(0, 1).to(dtype)
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not bool(failed):
            root = lower.to(torch.float32).flip(0, 1)
            if bool(torch.isfinite(root.diagonal().reciprocal()).all()):
                return root, damp
        damp += max(increment, 0.01)
    raise QuantmillError(
        SINGULAR(
            name,
            "its inputs are degenerate: all tokens alike, or far beyond float32",
            "calibrate with more and more varied text",
        )
    )


def inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular ``[n, n]``, worked in float64."""
    unit = torch.eye(upper.shape[0], dtype=torch.float64, device=upper.device)
    made = torch.linalg.solve_triangular(upper.to(torch.float64), unit, upper=True)
    return made.to(upper.dtype).contiguous()
