"""``pytest --quantmill-backend NAME``, as an author runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_suite_runs_on_a_backend_and_on_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine():\n    assert False\n")
    done = run(tmp_path, "--quantmill-backend", "bnb-nf4", "-k", "config or codec_undoes")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "test_mine" not in done.stdout
    done = run(tmp_path, "--quantmill-backend", "bnb", "--collect-only", "test_mine.py")
    assert "test_mine" in done.stdout
    for name in ("TestBnbNf4Dq", "TestBnbInt8", "TestBnbFp4"):
        assert f"::{name}::test_the_plugin_is_ok" in done.stdout


def test_an_unknown_backend_is_wrong_usage(tmp_path: Path) -> None:
    for name, words in (("bnb-nf5", "no installed plugin"), ("transformers", "has no method")):
        done = run(tmp_path, "--quantmill-backend", name)
        assert done.returncode == 4 and words in done.stderr


def test_it_costs_nothing_where_it_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it():\n"
        "    assert 'quantmill.pytest_plugin' in sys.modules\n"
        "    heavy = {'torch', 'pydantic', 'quantmill.host', 'quantmill.testing'}\n"
        "    assert not heavy & set(sys.modules)\n"
    )
    done = run(tmp_path, "test_it.py")
    assert done.returncode == 0, done.stdout
