"""A stranger's wheel beside a running environment: seen everywhere, and when broken harming nobody.

The wheel is that of ``examples/quantmill-ternary``. It is unpacked to a folder that goes on the
path, broken there on purpose, and what quantmill does about it is asked of new processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "tests" / "data" / "tiny-llama"
Site = Path


def python(site: Path, *arguments: Any, ok: bool = True) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr or not ok, done.stderr
    return done


# Several commands of one new process, which is as long in starting as in answering them.
COMMANDS = """
import contextlib, io, json, sys
from quantmill.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stopped:
            results.append([stopped.code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def ask(site: Site, *commands: Sequence[Any]) -> list[Answer]:
    given = json.dumps([[str(word) for word in command] for command in commands])
    answers = json.loads(python(site, "-c", COMMANDS, given).stdout)
    assert len(answers) == len(commands)
    assert not any("Traceback" in answer[2] for answer in answers)
    return [Answer(*answer) for answer in answers]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The example's wheel, built and installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("stranger")
    command = ("-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist")
    python(folder, *command, ROOT / "examples" / "quantmill-ternary")
    (wheel,) = (folder / "dist").glob("*.whl")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    python(folder, "-m", "pip", "install", "-q", *options, "--target", folder / "site", wheel)
    return folder / "site"


@pytest.fixture
def site(installed: Site, tmp_path: Path) -> Site:
    """A copy to break."""
    return Path(shutil.copytree(installed, tmp_path / "site"))


LIST = ("plugins", "--json")


def by_name(answer: Answer) -> dict[str, dict[str, Any]]:
    """What ``plugins --json`` says."""
    return {item["name"]: item for item in json.loads(answer.out)["plugins"]}


def test_it_is_listed_and_in_the_command_line(installed: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answers = ask(
        installed,
        LIST,
        ("schema", "ternary"),
        ("quantize", "--quiet", LLAMA, out, "ternary-64"),
        ("inspect", "--json", out),
        ("verify", out),
        # It is a source of conversion, too: the trits lie on a grid of eight bits.
        ("convert", out, tmp_path / "eight", "ct-int8", "--allow-requantize", "--quiet"),
    )
    assert [answer.code for answer in answers] == [0] * 6, answers
    mine = by_name(answers[0])["ternary"]
    assert mine["status"] == "ok" and mine["distribution"] == "quantmill-ternary"
    assert json.loads(answers[1].out)["properties"]
    modules = json.loads(answers[3].out)["modules"]
    assert {"ternary"} == {module["method"] for module in modules if module["method"]}
    # Without the package the checkpoint is refused in words.
    (refused,) = ask(tmp_path, ("plan", out))
    assert refused.code == 1 and "ternary" in refused.err


def test_its_own_tests_pass(installed: Site) -> None:
    tests = ROOT / "examples" / "quantmill-ternary" / "tests"
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", tests, "-k", "not Ternary32")
    done = python(installed, "-m", "pytest", *options, tests, ok=False)
    assert done.returncode == 0, done.stdout


PRETRAINED = """
import sys, torch, quantmill_transformers
from transformers import AutoModelForCausalLM
quantmill_transformers.activate()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config="ternary-64")
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2])
ids = torch.tensor([[5, 6, 7]])
with torch.inference_mode():
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
assert again.config.quantization_config.quant_method == "ternary"
"""


def test_from_pretrained_takes_it(installed: Site, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    python(installed, "-c", PRETRAINED, LLAMA, tmp_path / "saved")


# What is done to the package, the status it gets, and words of the reason.
METADATA = "METADATA"
PLUGIN = Path("quantmill_ternary") / "plugin.py"


def _append(code: str) -> Callable[[Site], None]:
    return lambda site: (site / PLUGIN).open("a").write(code) and None


def _replace(old: str, new: str, file: str = str(PLUGIN)) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        text = (site / file).read_text()
        assert old in text
        (site / file).write_text(text.replace(old, new))

    return change


def _metadata(old: str, new: str, file: str) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        (info,) = site.glob("quantmill_ternary-*.dist-info")
        text = (info / file).read_text()
        assert old in text
        (info / file).write_text(text.replace(old, new))

    return change


def _twice(site: Site) -> None:
    """Another distribution claims the plugin's name."""
    (info,) = site.glob("quantmill_ternary-*.dist-info")
    other = Path(shutil.copytree(info, site / "quantmill_other-1.0.dist-info"))
    text = (other / "METADATA").read_text()
    (other / "METADATA").write_text(text.replace("quantmill-ternary", "quantmill-other"))


KERNEL = """
@hookimpl
def quantmill_kernels():
    return [{"not": "a kernel"}]
"""
SIGNATURE = """
@hookimpl
def quantmill_validate(job, surprise):
    return []
"""
EXIT = "import sys\nsys.exit(3)\n"
BREAKAGES: dict[str, tuple[Callable[[Site], None], str, str]] = {
    "the entry point names no module": (
        _metadata("quantmill_ternary.plugin", "quantmill_ternary.nowhere", "entry_points.txt"),
        "broken",
        "No module named 'quantmill_ternary.nowhere'",
    ),
    "it raises when imported": (_append("1 / 0\n"), "broken", "ZeroDivisionError"),
    "it leaves the process when imported": (_append(EXIT), "broken", "SystemExit"),
    "it is no Python": (_append("def (:\n"), "broken", "SyntaxError"),
    "another API version": (
        _replace("QUANTMILL_API = 1", "QUANTMILL_API = 99"),
        "wrong API version",
        "was made for API 99",
    ),
    "no API version": (
        _replace("QUANTMILL_API = 1", ""),
        "wrong API version",
        "states no QUANTMILL_API",
    ),
    "a hook of a wrong signature": (_append(SIGNATURE), "broken", "surprise"),
    "a hook that does not exist": (
        _append("@hookimpl\ndef quantmill_surprise():\n    return []\n"),
        "broken",
        "unknown hooks: quantmill_surprise",
    ),
    "a name that another distribution claims": (_twice, "conflict", "quantmill-other"),
    "a short name that another plugin has": (
        _replace('"ternary-32"', '"bnb-nf4"'),
        "conflict",
        "quantmill-bnb",
    ),
    "it registers garbage": (_append(KERNEL), "broken", "quantmill_kernels"),
    "it raises in a registration": (
        _append("@hookimpl\ndef quantmill_finalizers():\n    raise OSError('no disk')\n"),
        "broken",
        "no disk",
    ),
    "it needs what is not there": (
        _metadata(
            "Requires-Dist: quantmill<0.2,>=0.1", "Requires-Dist: surely-not-there>=7", METADATA
        ),
        "missing requirement",
        "surely-not-there",
    ),
    "it needs another quantmill": (
        _metadata("<0.2,>=0.1", ">=77", METADATA),
        "missing requirement",
        "quantmill>=77",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_says_so_and_breaks_nothing_else(site: Site, name: str) -> None:
    break_it, status, reason = BREAKAGES[name]
    break_it(site)
    listed, other, asked, strict = ask(
        site,
        LIST,
        ("plan", LLAMA, "fp8-row", "--json"),
        ("plan", LLAMA, "ternary-64"),
        ("plugins", "--strict"),
    )
    found = by_name(listed)
    mine = found.pop("ternary")
    assert mine["status"] == status, mine
    assert reason in mine["reason"] and mine["fix"]
    assert found and all(item["status"] == "ok" for item in found.values()), "others suffer"
    # Others go on, and what is asked of the broken one is answered with the reason.
    assert other.code == 0, other.out
    assert asked.code == 1 and mine["status"] in asked.err
    assert strict.code == 3


LATER = {
    "a hook that raises": (
        _append("@hookimpl\ndef quantmill_validate(job):\n    raise RuntimeError('boom')\n"),
        "QM-PLUGIN-004",
        "RuntimeError: boom",
    ),
    "a config class that is not there": (
        _replace("config:TernaryConfig", "config:Nothing"),
        "QM-PLUGIN-004",
        "no attribute 'Nothing'",
    ),
    "a config class that is none": (
        _replace("quantmill_ternary.config:TernaryConfig", "pathlib:Path"),
        "QM-PLUGIN-004",
        "MethodConfig",
    ),
    "a quantizer that raises": (
        _replace(
            "form = empty_form(", "form = 1 / 0 + empty_form(", "quantmill_ternary/quantizer.py"
        ),
        "QM-PLUGIN-004",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_what_breaks_in_a_job_names_the_plugin(site: Site, tmp_path: Path, name: str) -> None:
    break_it, code, reason = LATER[name]
    break_it(site)
    listed, done, other = ask(
        site,
        LIST,
        ("quantize", "--quiet", "--json", LLAMA, tmp_path / "out", "ternary-64"),
        ("plan", LLAMA, "fp8-row", "--json"),
    )
    assert all(item["status"] == "ok" for item in by_name(listed).values())
    assert done.code == 1
    (finding,) = json.loads(done.out)["findings"]
    assert finding["code"] == code and reason in finding["cause"], finding
    assert "ternary" in finding["where"] and "quantmill-ternary 0.1.0" in finding["fix"]
    assert not (tmp_path / "out").exists()
    # Jobs that don't need it go on: with a warning, where it was asked at all.
    assert other.code == 0
    codes = [item["code"] for item in json.loads(other.out)["findings"]]
    assert codes.count("QM-PLUGIN-005") == (name == "a hook that raises")


def test_a_heavy_import_costs_its_own_registration_and_fails_its_conformance(site: Site) -> None:
    _append("import torch\n")(site)
    (listed,) = ask(site, LIST)
    assert by_name(listed)["ternary"]["status"] == "ok"
    options = ("-q", "-p", "no:cacheprovider", "--quantmill-backend", "ternary-64")
    done = python(site, "-m", "pytest", *options, "-k", "imports_nothing_heavy", ok=False)
    assert done.returncode == 1 and "1 failed" in done.stdout
