"""Second moments of a linear's inputs, and the factor that GPTQ compensates errors by."""

from __future__ import annotations

import torch
from torch import Tensor

from quantmill.findings import QuantmillError, declare

__all__ = ["Hessian", "inverse_factor"]

SINGULAR = declare("QM-GPTQ-003", "A Hessian stays singular whatever the damping")


class Hessian:
    """``X.T @ X`` of all inputs ``[tokens, in]``, accumulated in float32 and scaled to the mean
    over tokens."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._columns, self._device = columns, device
        # Made when the first inputs come: the Hessians of a block are not all there at once.
        self.total = torch.empty(0, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs ``[tokens, in]``."""
        if self.tokens == 0:
            self.total = torch.zeros(self._columns, self._columns, device=self._device)
        work = inputs.to(torch.float32)
        # Kept at the mean, so that a long calibration loses no bits to a growing sum.
        count = self.tokens + work.shape[0]
        self.total.mul_(self.tokens / count).addmm_(work.t(), work, alpha=1.0 / count)
        self.tokens = count

    def free(self) -> None:
        """It has served."""
        self.total = torch.empty(0, device=self._device)

    def mean(self) -> Tensor:
        """float32 ``[in, in]``."""
        return self.total


def inverse_factor(
    hessian: Tensor, damp: float, increment: float, name: str
) -> tuple[Tensor, float]:
    """The upper Cholesky factor ``U`` of the inverse, ``inv(H) = U.T @ U``, and the damping used.

    Columns of zero energy must have a one on the diagonal already.

    Raises:
        QuantmillError: the damping reached 1 and H is still not positive definite.
    """
    mean = hessian.diagonal().mean()
    work = hessian.to(torch.float64) if hessian.shape[0] <= 4096 else hessian
    while damp < 1.0:
        damped = work.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return upper.to(torch.float32).contiguous(), damp
        damp += max(increment, 0.01)
    raise QuantmillError(
        SINGULAR(
            name,
            "its inputs are degenerate: all tokens alike, or far beyond float32",
            "calibrate with more and more varied text",
        )
    )
