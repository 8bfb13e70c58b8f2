"""Wrong usage: exit code 2, what is wrong and what to do, no traceback; as JSON too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantmill.cli import COMMANDS

Cli = Callable[..., Any]

MISTAKES = [
    (["plna"], "Did you mean 'plan'?"),
    (["evla"], "Did you mean 'eval'?"),
    (["zzzz"], "No such command 'zzzz'"),
    (["--nonsense"], "--nonsense"),
    (["plan"], "Missing argument 'SOURCE'"),
    (["plan", ""], "it is empty"),
    (["plan", "model", " "], "it is empty"),
    (["plan", "model", "--jsn"], "--json"),
    (["plan", "model", "--dtype", "float64"], "float64"),
    (["plan", "model", "--device", "CPU!"], "write cpu, cuda or cuda:0"),
    (["plan", "model", "--device", "cpu:x"], "cpu:x"),
    (["plan", "model", "--context", "0"], "0 is not in the range"),
    (["plan", "model", "--memory", "lots"], "'lots' is no size"),
    (["plan", "model", "--memory", "1.2.3GiB"], "'1.2.3GiB' is no size"),
    (["plan", "model", "--memory", "-1"], "'-1' is no size"),
    (["plan", "model", "--memory", ".GiB"], "'.GiB' is no size"),
    (["plan", "model", "--memory", "0"], "less than a byte"),
    (["plan", "model", "--memory", "9" * 400], "is no size"),
    (["plan", "model", "method", "--memory", "1GiB"], "leave METHOD out"),
    (["plan", "model", "--memory", "1GiB", "--skip", "a", "--all"], "--skip, --all can't"),
    (["plan", "model", "method", "more"], "unexpected extra argument"),
    (["quantize", "model", "out"], "Missing argument 'METHOD'"),
    (["quantize", "model", "", "method"], "it is empty"),
    (["quantize", "model", "out", "method", "--max-shard", "0"], "less than a byte"),
    (["quantize", "model", "out", "method", "--non-finite", "drop"], "'drop' is not one of"),
    (["quantize", "model", "out", "method", "--calibration", "no/such/file"], "does not exist"),
    (["quantize", "model", "out", "method", "--calibration-samples", "0"], "0 is not in the range"),
    (["inspect"], "Missing argument 'SOURCE'"),
    (["eval", "model"], "Missing option '--text'"),
    (["eval", "model", "--text", "no/such/file"], "does not exist"),
    (["eval", "model", "--text", __file__, "--protocol", "random"], "'random' is not one of"),
    (["eval", "model", "--text", __file__, "--context", "1"], "1 is not in the range"),
    (["eval", "model", "--text", __file__, "--max-windows", "0"], "0 is not in the range"),
    (["generate", "model"], "Missing option '--prompt'"),
    (["generate", "model", "--prompt", "a", "--max-new-tokens", "0"], "0 is not in the range"),
    (["generate", "model", "--prompt", "a", "--temperature", "-1"], "-1.0 is not in the range"),
    (["generate", "model", "--prompt", "a", "--temperature", "nan"], "nan is no number"),
    (["generate", "model", "--prompt", "a", "--seed", "-1"], "-1 is not in the range"),
    (["plugins", "extra"], "unexpected extra argument"),
    (["doctor", "extra"], "unexpected extra argument"),
    (["kernels", "extra"], "are for --explain"),
    (["kernels", "--explain", "one"], "takes SOURCE METHOD MODULE"),
    (["kernels", "--explain", "1", "2", "3", "4"], "takes SOURCE METHOD MODULE"),
    (["schema"], "Missing argument 'METHOD'"),
    (["schema", '{"load_in_4bit": true}'], "the name of a method"),
    (["schema", "config.yaml"], "the name of a method"),
]
NAMES = [" ".join(arguments)[:40] for arguments, _ in MISTAKES]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=NAMES)
def test_a_mistake_in_words(cli: Cli, arguments: list[str], words: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert words in result.err and "Usage: quantmill" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=NAMES)
def test_a_mistake_as_json(cli: Cli, arguments: list[str], words: str) -> None:
    result = cli(*arguments, "--json")
    assert result.code == 2
    assert result.json["error"] is True and result.codes == ["QM-CLI-001"]
    finding = result.json["findings"][0]
    assert words in finding["cause"] or words == "--json"
    assert finding["fix"].startswith("see `quantmill")
    assert result.err == ""


def test_the_finding_names_the_command(cli: Cli) -> None:
    finding = cli("plan", "--json").json["findings"][0]
    assert finding["where"] == "quantmill plan" and finding["fix"] == "see `quantmill plan --help`"


def test_json_after_two_dashes_is_an_argument(cli: Cli) -> None:
    result = cli("plan", "--", "--json", "method", "more")
    assert result.code == 2 and result.out == "" and "unexpected extra argument" in result.err


def test_no_arguments_show_the_help_as_wrong_usage(cli: Cli) -> None:
    result = cli()
    assert result.code == 2 and result.out == ""
    assert all(name in result.err for name in COMMANDS)
    assert result.err == cli("--help").out


def test_the_help_of_all(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0 and result.err == ""
    for name, summary in COMMANDS.items():
        assert f"{name} " in result.out and summary.split()[0] in result.out
    flat = " ".join(result.out.split())
    for words in ("0 fine", "1 errors", "2 wrong usage", "3 the environment", "130 interrupted"):
        assert words in flat


@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command(cli: Cli, name: str, flag: str) -> None:
    result = cli(name, flag)
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"Usage: quantmill {name} ")
    assert "--json" in result.out, "every command takes --json"


def test_the_version(cli: Cli) -> None:
    import quantmill

    result = cli("--version")
    assert (result.code, result.out) == (0, f"quantmill, version {quantmill.__version__}\n")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("512B", 512),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        (".5KiB", 512),
        ("2.KB", 2000),
        ("8GB", 8 * 10**9),
        ("1TiB", 2**40),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes(cli: Cli, text: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import quantmill

    asked: list[int] = []

    def fits(source: str, memory: int, **options: Any) -> list[Any]:
        asked.append(memory)
        return []

    monkeypatch.setattr(quantmill, "fits", fits, raising=False)
    result = cli("plan", "model", "--memory", text, "--json")
    assert result.code == 1, "nothing fits"
    assert asked == [count] and result.json == {"memory": count, "candidates": []}


def test_calibration_options_reach_the_interface(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import quantmill
    from quantmill.findings import QuantmillError

    given: dict[str, Any] = {}

    def quantize(*arguments: Any, **options: Any) -> None:
        given.update(options)
        raise QuantmillError()

    monkeypatch.setattr(quantmill, "quantize", quantize, raising=False)
    arguments = ["--calibration", __file__, "--calibration-samples", "7"]
    arguments += ["--calibration-length", "64", "--calibration-seed", "3"]
    assert cli("quantize", "model", "out", "method", *arguments).code == 1
    assert given["calibration"] == Path(__file__)
    assert (given["samples"], given["length"], given["seed"]) == (7, 64, 3)
    assert not [name for name in given if name.startswith("calibration_")]
    given.clear()
    cli("quantize", "model", "out", "method")
    assert given["calibration"] is None and given["samples"] == 128


@pytest.mark.parametrize(
    ("data", "cause"), [(b"plain \xff", "byte 6"), (b"", "empty"), (b" \n", "spaces")]
)
def test_a_text_that_is_none(cli: Cli, tmp_path: Path, data: bytes, cause: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    for command in (("eval", "model"), ("choose", "model", "--memory", "1GiB")):
        result = cli(*command, "--text", path, "--json")
        assert result.code == 1 and result.codes == ["QM-EVAL-004"]
        (finding,) = result.json["findings"]
        assert cause in finding["cause"] and str(path) in finding["where"]
