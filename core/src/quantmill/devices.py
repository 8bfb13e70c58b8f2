"""Which devices this machine has."""

from __future__ import annotations

__all__ = ["cuda_there"]


def cuda_there(device: str) -> bool:
    """Whether torch sees this one: ``cuda``, or ``cuda:`` and its number. Imports torch."""
    import torch

    index = torch.device(device).index or 0
    return torch.cuda.is_available() and index < torch.cuda.device_count()
