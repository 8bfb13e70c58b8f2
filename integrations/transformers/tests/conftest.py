"""Small models on the disk, written once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers

from quantmill_transformers.testing import write


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> Iterator[None]:
    """No progress bars and reports of the library between the dots."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of the zoo, which no test changes."""
    root = tmp_path_factory.mktemp("small")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write(name, path)

    return folder
