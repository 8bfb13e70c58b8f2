"""The library is as usual before and after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quantmill_cpu import native


@pytest.fixture(autouse=True)
def _best_level() -> Iterator[None]:
    yield
    native.use_level(native.levels()[-1])
    native.use_matmul_level("")


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """``native.library`` loads again in the test, and as usual after it."""
    native.library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.library.cache_clear()
