"""Calibrating the experts of a mixture: each sees only the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantmill.findings import Finding, Severity, declare
from quantmill.targeting.types import Target

__all__ = ["few_tokens", "in_order_of_experts", "shrunk"]

FEW_TOKENS = declare(
    "QM-CALIB-060",
    "Few calibration tokens reached some experts",
    Severity.WARNING,
    fallback=True,
)


def in_order_of_experts(
    groups: Sequence[list[Target]], targets: Sequence[Target]
) -> list[list[Target]]:
    """Groups of targets that share an input, with the experts' ones put in their true order.

    One batch does not tell: it reaches some experts, and their inputs are slices of one tensor.
    All of a mixture's matrices come where its first one was met, expert by expert; those that
    read the same rows (gate and up) are a group.
    """
    mixtures: dict[str, dict[tuple[int, str], list[Target]]] = {}
    for target in targets:
        part = target.module.parts.get("weight")
        if part is not None:
            of_one = mixtures.setdefault(part.module, {})
            of_one.setdefault((part.expert, part.parameter), []).append(target)
    ordered: list[list[Target]] = []
    for members in groups:
        part = members[0].module.parts.get("weight")
        if part is None:
            ordered.append(members)
        elif part.module in mixtures:
            ordered.extend(mixtures.pop(part.module).values())
    return ordered


def shrunk(moments: Tensor, tokens: int) -> Tensor:
    """Second moments of few tokens, their off-diagonal part drawn towards zero.

    With fewer tokens than columns, moments are singular and most of what lies beside the diagonal
    is chance: a quantizer that trusts it can do worse than rounding. The correlations are
    multiplied by ``1 - v`` with ``v = sum((1 - r^2)^2 / (n - 1)) / sum(r^2)``, the variance of a
    sample correlation over its square (Schaefer and Strimmer 2005, doi 10.2202/1544-6115.1175,
    with the variance that Gaussian inputs have).

    Args:
        moments: float ``[in, in]``, the mean of ``x x.T``.
        tokens: how many they are of.

    Returns:
        ``moments`` itself where ``tokens`` is at least ``in``.
    """
    columns = moments.shape[0]
    if tokens == 0 or tokens >= columns or columns < 2:
        return moments
    diagonal = moments.diagonal()
    scale = diagonal.clamp(min=1e-30).rsqrt()
    squared = (moments * scale.unsqueeze(0) * scale.unsqueeze(1)).square_()
    squared.fill_diagonal_(0.0)
    # The sum of (1 - r^2)^2 beside the diagonal, without another matrix.
    spread = columns * (columns - 1) - 2 * squared.sum() + squared.square().sum()
    share = (spread / max(tokens - 1, 1) / squared.sum().clamp(min=1e-30)).clamp(0.0, 1.0)
    if tokens == 1:
        share = torch.ones_like(share)  # Two numbers are always correlated.
    result = moments * (1.0 - share)
    result.diagonal().copy_(diagonal)
    return result


def few_tokens(block: str, targets: Sequence[Target], tokens: Mapping[str, int]) -> Finding | None:
    """What to say of a block some of whose targets (by name) saw fewer tokens than they have
    columns; None when all saw enough."""
    few = [item for item in targets if tokens.get(item.name, item.in_features) < item.in_features]
    if not few:
        return None
    least = min(few, key=lambda item: tokens[item.name])
    none = sum(tokens[item.name] == 0 for item in few)
    cause = (
        f"{len(few)} of {len(targets)} weights of {block} saw fewer tokens than they have columns,"
        f" {least.name} the fewest ({tokens[least.name]:,} for {least.in_features:,} columns):"
        " of their inputs' correlations only a share is trusted"
    )
    if none:
        cause += f"; {none} saw none and are rounded to nearest"
    return FEW_TOKENS(least.name, cause, "calibrate with more text (--samples, --length)")
