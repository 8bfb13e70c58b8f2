"""``pytest --quantmill-backend NAME``: the conformance suite on an installed backend.

NAME is a plugin, a method or a METHOD (``mymethod-4:group_size=32``); of the first two every short
name is tested. Without paths of its own pytest then runs this suite alone. Loaded by every pytest
where quantmill is installed, this module imports nothing but pytest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

__all__ = ["chosen"]

chosen: list[str] = []
"""What the suite is to test; :mod:`quantmill.testing.backend_suite` reads it."""

_SUITE: Final = Path(__file__).parent / "testing" / "backend_suite.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option."""
    parser.getgroup("quantmill").addoption(
        "--quantmill-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run quantmill's conformance suite on a plugin, a method or a METHOD (repeatable)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Add the suite to what is collected."""
    names = config.getoption("--quantmill-backend")
    if not names:
        return
    from quantmill.testing.backends import methods_of

    for name in names:
        try:
            methods_of(name)
        except ValueError as error:
            raise pytest.UsageError(f"--quantmill-backend: {error}") from None
    chosen[:] = names
    given = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
    config.args = [*(item for item in given if item != str(_SUITE)), str(_SUITE)]
