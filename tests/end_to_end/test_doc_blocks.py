"""Every code block of the documentation runs as it stands and prints what the page says.

Each page runs in a folder of its own beside ``models/novella``, from top to bottom: commands
through the command line, Python in one namespace. ``...`` in an output stands for any lines.
Sizes have to be right within a percent, measured figures within some (machines round differently);
times and the widths of columns may be anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from quantmill.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# What would install packages or start processes has tests of its own; see where.
ELSEWHERE = {
    "python": "tests/dist",
    "pip": "tests/dist",
    "torchrun": "tests/end_to_end/test_processes.py",
}
# The guide's command sequence is run as a whole there, in an environment of its own.
WHOLE_PAGES_ELSEWHERE = {"authors/index.md": "tests/end_to_end/test_template.py"}
TOLERANCE, SMALLEST = 0.05, 0.0005
# What weights take in memory depends a little on the processor's kernels.
OF_SIZES = 0.01


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], text[: m.start()].count("\n") + 2, m[2]) for m in found]


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Each command of a block with the lines that it is said to print."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command.partition(" #")[0], [line for line in output.splitlines() if line.strip()]


def alike(said: str, printed: str) -> bool:
    """Whether a line says what was printed: words and sizes exactly, figures nearly."""
    # Rules and columns are as wide as the widest path.
    left, right = (re.sub(r"-{2,}", "-", line).split() for line in (said, printed))
    if len(left) != len(right):
        return False
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a == b:
            continue
        unit = left[index + 1] if index + 1 < len(left) else ""
        if unit in ("s", "s:") or (index and left[0] == "seconds"):
            continue
        numbers = [re.fullmatch(r"\(?(-?[\d.]+)([%,;)]*)", word) for word in (a, b)]
        if not all(numbers):
            return False
        near = OF_SIZES if unit in ("B", "KiB", "MiB", "GiB") else TOLERANCE
        one, other = (float(match[1].rstrip(".")) for match in numbers if match)
        if abs(one - other) > max(near * max(abs(one), abs(other)), SMALLEST):
            return False
    return True


def first_difference(said: list[str], printed: list[str]) -> str | None:
    """The first line of an output that was not printed there, ``...`` being any lines."""
    at, free = 0, False
    for line in said:
        if line.strip() == "...":
            free = True
            continue
        ends = range(at, len(printed)) if free else range(at, min(at + 1, len(printed)))
        hit = next((index for index in ends if alike(line, printed[index])), None)
        if hit is None:
            return line
        at, free = hit + 1, False
    return None


def run(words: list[str]) -> list[str]:
    """The lines that a command prints, on stdout and stderr."""
    both = io.StringIO()
    with pytest.MonkeyPatch.context() as environment:
        while "=" in words[0]:
            environment.setenv(*words.pop(0).split("=", 1))
        assert words[0] == "quantmill", words
        with (
            contextlib.redirect_stdout(both),
            contextlib.redirect_stderr(both),
            contextlib.suppress(SystemExit),
        ):
            main(words[1:])
    assert "Traceback" not in both.getvalue(), both.getvalue()
    return [line for line in both.getvalue().splitlines() if line.strip()]


def check_console(block: Block) -> None:
    for command, said in commands(block):
        words = shlex.split(command)
        if words[0] in ELSEWHERE:
            continue
        printed = run(words)
        refused = any(line.startswith("error QM-") for line in printed)
        assert refused == any(line.startswith("error QM-") for line in said), "\n".join(printed)
        missing = first_difference(said, printed)
        assert missing is None, f"$ {command}\nis said to print\n{missing}\nand prints\n" + (
            "\n".join(printed)
        )


def check_data(block: Block) -> None:
    """A config: METHOD as it stands, or what a checkpoint records."""
    import quantmill
    from quantmill.host import default_host

    if block.language == "yaml":
        name = block.text.split("\n")[0].removeprefix("# ")
        Path(name).write_text(block.text, encoding="utf-8")
        quantmill.plan("models/novella", name)
        return
    data = json.loads(block.text)
    if "method" in data:
        quantmill.plan("models/novella", data).raise_errors()
    elif "quant_method" in data:
        assert set(data.get("methods", ())) <= set(default_host().presets)
    else:
        pytest.fail(f"line {block.line}: what is this for?")


def check_python(block: Block, names: dict[str, Any], page: Path) -> None:
    exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)


def check_session(block: Block, names: dict[str, Any], page: Path) -> None:
    parsed = doctest.DocTestParser().get_doctest(block.text, names, page.name, None, block.line)
    failures = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    assert runner.run(parsed, out=failures.write, clear_globs=False).failed == 0, (
        failures.getvalue()
    )
    names.update(parsed.globs)


def write_pipeline(folder: Path) -> None:
    """A tiny pipeline of a transformer, a text encoder and an autoencoder, all random."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PixArtAlphaPipeline,
        PixArtTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    width = {"num_attention_heads": 2, "attention_head_dim": 16}
    pipeline = PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        ),
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=16),
        transformer=PixArtTransformer2DModel(
            **width, num_layers=2, sample_size=8, cross_attention_dim=32, caption_channels=32
        ),
        scheduler=DDIMScheduler(),
    )
    pipeline.save_pretrained(folder)


# What a page takes for granted beside models/novella.
GIVEN = {"frameworks.md": lambda folder: write_pipeline(folder / "path" / "to" / "pipeline")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a page runs. What it activated or configured ends with it."""
    import quantmill_transformers

    diffusers = pytest.importorskip("quantmill_diffusers")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "novella").symlink_to(ROOT / "models" / "novella")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTMILL_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    yield tmp_path
    quantmill_transformers.deactivate()
    diffusers.deactivate()


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language != "text"]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if runnable(page)],
)
def test_the_blocks_of_a_page_do_what_it_says(page: Path, folder: Path) -> None:
    if page.is_relative_to(DOCS) and str(page.relative_to(DOCS)) in WHOLE_PAGES_ELSEWHERE:
        where = WHOLE_PAGES_ELSEWHERE[str(page.relative_to(DOCS))]
        assert page.name in (ROOT / where).read_text(encoding="utf-8"), where
        return
    if page.name in GIVEN:
        GIVEN[page.name](folder)
    names: dict[str, Any] = {"__name__": "page"}
    for block in runnable(page):
        match block.language:
            case "console":
                check_console(block)
            case "python":
                check_python(block, names, page)
            case "pycon":
                check_session(block, names, page)
            case "json" | "yaml":
                check_data(block)
            case _:
                pytest.fail(f"{page.name}:{block.line}: a block of {block.language or 'nothing'}")


def test_a_line_is_held_to_its_words_sizes_and_figures() -> None:
    assert alike("wrote 6.20 MiB in 0.1 s: 56", "wrote 6.20 MiB in 3.2 s: 56")
    assert alike("KL 0.0166 nats (0.0155 to", "KL 0.0165 nats (0.0156 to")
    assert not alike("wrote 6.20 MiB", "wrote 6.30 MiB")
    assert not alike("kl 0.010", "kl 0.012")
    assert not alike("no value changed", "one value changed")
    assert first_difference(["a", "...", "d"], ["a", "b", "c", "d"]) is None
    assert first_difference(["a", "d"], ["a", "b", "d"]) == "d"
