"""What no command foresaw, interrupts and closed pipes: one line, an exit code, no traceback."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantmill
from quantmill.findings import QuantmillError, Severity, declare

Cli = Callable[..., Any]
CALL = [sys.executable, "-c", "from quantmill.cli import main; main()"]
EXAMPLE = declare("QM-TESTCLI-001", "For this test")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], list[str]]:
    """A command that raises what it is told to."""

    def prepare(error: BaseException) -> list[str]:
        def fail(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(quantmill, "method_schema", fail, raising=False)
        return ["schema", "some-method"]

    return prepare


FAILURES: list[tuple[BaseException, str, str, int]] = [
    (RuntimeError("out of luck"), "QM-CLI-003", "RuntimeError: out of luck", 1),
    (AssertionError(), "QM-CLI-003", "AssertionError", 1),
    (MemoryError(), "QM-CLI-003", "MemoryError", 1),
    (RecursionError("too deep"), "QM-CLI-003", "too deep", 1),
    (OSError(errno.ENOSPC, "No space left", "there"), "QM-CLI-002", "No space left", 1),
    (PermissionError(errno.EACCES, "denied", "there"), "QM-CLI-002", "denied", 1),
    (QuantmillError(EXAMPLE("here", "it is so", "mend it")), "QM-TESTCLI-001", "it is so", 1),
    (KeyboardInterrupt(), "QM-CLI-004", "interrupted", 130),
]
NAMES = [type(error).__name__ for error, *_ in FAILURES]


@pytest.mark.parametrize(("error", "code", "words", "exit_code"), FAILURES, ids=NAMES)
def test_in_words(
    cli: Cli, failing: Any, error: BaseException, code: str, words: str, exit_code: int
) -> None:
    result = cli(*failing(error))
    assert result.code == exit_code and result.out == ""
    assert code in result.err and words in result.err and "Traceback" not in result.err


@pytest.mark.parametrize(("error", "code", "words", "exit_code"), FAILURES, ids=NAMES)
def test_as_json(
    cli: Cli, failing: Any, error: BaseException, code: str, words: str, exit_code: int
) -> None:
    result = cli(*failing(error), "--json")
    assert result.code == exit_code and result.codes == [code] and not result.err.strip()
    assert words in result.json["findings"][0]["cause"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_traceback_only_with_debug(cli: Cli, failing: Any, before: bool) -> None:
    arguments = [*failing(RuntimeError("out of luck")), "--json"]
    assert "--debug" in cli(*arguments).json["findings"][0]["fix"]
    result = cli(*(["--debug", *arguments] if before else [*arguments, "--debug"]))
    assert result.code == 1 and result.codes == ["QM-CLI-003"]
    assert "Traceback" in result.err and "RuntimeError: out of luck" in result.err


def test_several_findings_are_all_shown(cli: Cli, failing: Any) -> None:
    error = QuantmillError(EXAMPLE("a", "first", "mend it"), EXAMPLE("b", "second\nlines", ""))
    result = cli(*failing(error))
    assert result.err.splitlines() == [
        "error QM-TESTCLI-001 a",
        "  first",
        "  fix: mend it",
        "error QM-TESTCLI-001 b",
        "  second",
        "  lines",
    ]
    assert all(item.severity is Severity.ERROR for item in error.findings)


def test_what_libraries_log_needs_debug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(*arguments: object) -> dict[str, Any]:
        seen.append(logging.getLogger("some.library").isEnabledFor(logging.WARNING))
        return {}

    monkeypatch.setattr(quantmill, "method_schema", look, raising=False)
    cli("schema", "m")
    cli("--debug", "schema", "m")
    cli("schema", "m", "--debug")
    assert seen == [False, True, True]
    assert logging.getLogger("some.library").isEnabledFor(logging.WARNING), "it was put back"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins", "--json"], ["plna", "--json"], ["kernels", "--help"]]
)
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*CALL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    code = process.wait(timeout=60)
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    # Wrong usage stays wrong usage: its message goes to stderr then.
    assert code == (2 if arguments[0] == "plna" else 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--json"]])
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*CALL, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "QM-CLI-002" in done.stderr and os.strerror(errno.ENOSPC) in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_while_it_runs() -> None:
    script = (
        "import os, signal, quantmill\n"
        # Python takes no interrupts where the process that started it ignores them.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "quantmill.method_schema = lambda name: os.kill(os.getpid(), signal.SIGINT)\n"
        "from quantmill.cli import main\n"
        "main(['schema', 'm', '--json'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130 and "QM-CLI-004" in done.stdout
    assert "Traceback" not in done.stderr
