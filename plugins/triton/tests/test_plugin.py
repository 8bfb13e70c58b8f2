"""Registrations: light to import, honest about what they need."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from quantmill.kernels import KernelRegistry
from quantmill_triton import available
from quantmill_triton.plugin import quantmill_kernels


def test_the_entry_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, quantmill_triton.plugin as p; p.quantmill_kernels();"
        "print([m for m in ('torch', 'triton', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_entry_point_is_there() -> None:
    found = entry_points(group="quantmill.plugins", name="triton")
    assert [point.value for point in found] == ["quantmill_triton.plugin"]


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert "Triton is not installed" in (available.unavailable() or "")


def test_without_a_gpu_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "not built for CUDA" in (available.unavailable() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "TRITON_INTERPRET" in (available.unavailable() or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available.unavailable() is None


def test_names_are_unique_and_kernels_share_one_layout() -> None:
    kernels = quantmill_kernels()
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    reading = [kernel for kernel in kernels if kernel.operation != "activations"]
    assert {kernel.layout for kernel in reading} == {"triton"}
    KernelRegistry(kernels, environment=False)


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        ({"bits": 7}, "needs bits"),
        ({"group_size": 24}, "needs group_size"),
        ({"grouping": "strided"}, "needs grouping"),
        ({"packing": "i8"}, "needs packing"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_constraint(traits: dict[str, object], reason: str) -> None:
    good = {
        "bits": 4,
        "packing": "dense",
        "grouping": "group",
        "group_size": 128,
        "offset": "zero",
        "act_order": False,
        "nested": False,
    }
    kernels = KernelRegistry(quantmill_kernels(), environment=False)
    kernel, reasons = kernels.explain(
        "matmul", "affine", {**good, **traits}, device="cuda", dtype="bfloat16"
    )
    assert kernel is None
    assert reason in reasons["triton-matmul-affine-group"]
