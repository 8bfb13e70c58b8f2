"""What ``plugins/triton/tests/conftest.py`` sets for its own run, before anything is imported.

Triton reads the variable once, and a peer that a test of another package imports brings it along.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

if find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
