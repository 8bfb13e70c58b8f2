"""Whether the kernels can run here. Imports neither Triton nor anything that compiles."""

from __future__ import annotations

import os
from importlib.util import find_spec

__all__ = ["interpreted", "unavailable"]


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU in place of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unavailable() -> str | None:
    """Why the kernels can't run on this machine, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed; PyTorch's CUDA wheels bring it"
    if interpreted():
        return None
    import torch

    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is not built for CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 interprets the kernels on the CPU"
    return None
