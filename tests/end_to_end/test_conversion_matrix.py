"""Every source x every target, carried out and proved; the documentation shows what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import quantmill

Script = Callable[[str], ModuleType]

for _package in (
    "awq",
    "bnb",
    "compressed_tensors",
    "fp8",
    "gguf",
    "gptq",
    "hqq",
    "quanto",
    "torchao",
):
    pytest.importorskip(f"quantmill_{_package}")
pytest.importorskip("quantmill_transformers")

IDS = torch.arange(24).reshape(1, 24)


@pytest.fixture(scope="module")
def tool(script: Script) -> Any:
    return script("tools/conversion_matrix.py")


def logits(folder: Path) -> torch.Tensor:
    """What the decoded weights compute: float linears, so that no kernel has a say."""
    model: Any = quantmill.load(folder, dequantize=True, dtype="float32")
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def cells(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """All cells; for lossless ones the logits are compared while the result is there."""
    root = tmp_path_factory.mktemp("matrix")
    model, tokens = tool.tiny_model(root)
    sources = dict(tool.make_sources(model, root, tokens))
    found = []
    for name, folder in sources.items():
        before = logits(folder)
        for target in tool.TARGETS:
            cell = tool.convert(name, folder, target, root)
            if cell.kind == "lossless":
                assert torch.equal(logits(cell.folder), before), (name, target)
            found.append(cell)
    return found


def test_lossless_cells_are_proved_and_compute_the_same_logits(cells: list[Any]) -> None:
    lossless = [cell for cell in cells if cell.kind == "lossless"]
    assert len(lossless) > 80
    # One layer of seven linears, and embedding and head of a GGUF file: each was decoded again.
    assert {cell.report.proved for cell in lossless} == {7, 9}
    assert not any(cell.report.errors for cell in lossless)


def test_floats_come_of_every_source(cells: list[Any]) -> None:
    assert {cell.kind for cell in cells if cell.target == "bf16"} == {"dequantize"}


def test_what_changes_values_is_refused_with_the_reason(cells: list[Any]) -> None:
    others = [cell for cell in cells if cell.kind not in ("lossless", "dequantize")]
    assert {cell.kind for cell in others} == {"requantize"}
    assert all(cell.reason for cell in others)


def test_the_documentation_shows_this_matrix(tool: Any, cells: list[Any]) -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    assert tool.table(cells) in page, "renew it: python tools/conversion_matrix.py"
