"""Where there is no GPU, Triton's interpreter runs the kernels: set before anything imports it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if find_spec("triton") is not None and not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Kernels need a module of their own: Triton reads their source from its file.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def broken_interpreter() -> str:
    """What fails when a loop over a kernel's argument is interpreted, or nothing.

    Triton up to 3.6 converts arrays of one element, which numpy 2.4 refuses.
    """
    if GPU or find_spec("triton") is None:
        return ""
    import interpreted_loop

    out = torch.zeros(1)
    try:
        interpreted_loop.count[(1,)](out, 3)
    except Exception as error:  # noqa: BLE001 whatever it is, kernels can't be interpreted
        return f"Triton's interpreter does not work here: {error}"
    return "" if out.item() == 3 else "Triton's interpreter miscounts"


@pytest.fixture
def device(broken_interpreter: str) -> str:
    """Where kernels run here."""
    pytest.importorskip("triton", reason="Triton is not installed (PyTorch's CUDA wheels bring it)")
    if broken_interpreter:
        pytest.skip(broken_interpreter)
    return "cuda" if GPU else "cpu"
