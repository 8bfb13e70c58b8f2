"""Whether the kernels can run here. Imports neither Triton nor anything that compiles."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["gluon_known", "interpreted", "unavailable"]


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU in place of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def gluon_known() -> bool:
    """Whether Triton's Gluon is one that the kernel for Hopper is written for: names change with
    each release. It ran with 3.6, and is compiled with 3.7 and 3.8."""
    try:
        found = version("triton").split(".")
    except PackageNotFoundError:
        return False
    return found[0] == "3" and found[1] in ("6", "7", "8")


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
