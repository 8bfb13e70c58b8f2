"""Every source x every target of a conversion, carried out: the table in docs/conversion.md.

    python tools/conversion_matrix.py                  renew the table (a tiny model, seconds)
    python tools/conversion_matrix.py --model DIR      carry out every cell on another model

The table is what came out, not what was expected: a test makes it again and compares.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import quantmill
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_llama

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conversion.md"
NOVELLA = PAGE.parent.parent / "models" / "novella"
_BLOCK = re.compile(r"<!-- matrix -->\n.*?<!-- end of the matrix -->", re.DOTALL)

SOURCES = {
    "GPTQ 4-bit": "gptq-4:group_size=32",
    "GPTQ 4-bit, zero points, act-order": "gptq-4:group_size=32,sym=false,desc_act=true",
    "GPTQ 3-bit": "gptq-3:group_size=32",
    "GPTQ 8-bit": "gptq-8:group_size=32",
    "AWQ 4-bit": "awq-4:group_size=32",
    "compressed-tensors int4": "ct-int4:group_size=32",
    "compressed-tensors int8": "ct-int8",
    "compressed-tensors FP8": "ct-fp8",
    "HQQ 4-bit": "hqq-4:group_size=32",
    "Quanto int8": {"quant_method": "quanto", "weights": "int8"},
    "Quanto int4": {"quant_method": "quanto", "weights": "int4"},
    "bitsandbytes NF4": "bnb-nf4",
    "bitsandbytes NF4, double": "bnb-nf4-dq",
    "bitsandbytes int8": "bnb-int8",
    "FP8 blocks": "fp8-block:weight_block_size=[32,32]",
    "FP8 rows": "fp8-row",
    "FP8 whole": "fp8-tensor",
    "MXFP8": "fp8-mx",
    "torchao int8": "torchao-int8wo",
    "torchao int4 (tinygemm)": "torchao-int4wo:group_size=32",
    "GGUF Q8_0": "gguf-q8_0",
    "GGUF Q6_K": "gguf-q6_k",
    "GGUF Q4_0": "gguf-q4_0",
    "GGUF Q4_K": "gguf-q4_k_s",
}
"""Name in the table to the METHOD that makes it of the float model."""
TARGETS = {
    "GPTQ": "gptq",
    "AWQ": "awq",
    "compressed-tensors": "compressed-tensors",
    "HQQ": "hqq",
    "Quanto": "quanto",
    "bnb NF4": "bnb-nf4",
    "bnb int8": "bnb-int8",
    "FP8 blocks": "fp8",
    "FP8 rows": "fbgemm-fp8",
    "torchao": "torchao",
    "GGUF": "gguf",
    "bf16": "bf16",
}
"""Name in the table to METHOD."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One conversion."""

    source: str
    target: str
    kind: str
    """``lossless``, ``dequantize``, ``requantize`` (refused without the option) or ``refused``."""
    reason: str
    folder: Path | None
    """What was written."""
    report: Any = None


def make_sources(model: Path, root: Path, calibration: Any) -> Iterator[tuple[str, Path]]:
    """Quantize the model in every source format."""
    for number, (name, method) in enumerate(SOURCES.items()):
        folder = root / f"source-{number}{'.gguf' if name.startswith('GGUF') else ''}"
        if not folder.exists():
            quantmill.quantize(
                model, folder, method, calibration=calibration, samples=16, length=32
            )
        yield name, folder


def convert(source: str, folder: Path, target: str, root: Path) -> Cell:
    """One cell, with proof."""
    output = root / ("converted.gguf" if target == "GGUF" else "converted")
    shutil.rmtree(root / "converted", ignore_errors=True)
    (root / "converted.gguf").unlink(missing_ok=True)
    try:
        report = quantmill.convert(folder, output, TARGETS[target], verify=True)
    except QuantmillError as error:
        codes = {item.code for item in error.findings}
        kind = "requantize" if codes == {"QM-CONVERT-002"} else "refused"
        return Cell(source, target, kind, error.findings[0].cause, None)
    assert report.proved is not None and report.proved > 0, "nothing was proved"
    return Cell(source, target, report.route.kind, "", output, report)


def tiny_model(root: Path) -> tuple[Path, Any]:
    """A model of one layer whose widths suit every format, and tokens to calibrate with."""
    model = write_tiny_llama(root / "float", layers=1, hidden=256, inner=256, vocab=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a GGUF file holds one
        shutil.copy(NOVELLA / name, model)
    tokens = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
    return model, tokens


def cells(model: Path, calibration: Any, root: Path) -> Iterator[Cell]:
    """The whole matrix. What a cell wrote is gone when the next one is asked for."""
    for name, folder in make_sources(model, root, calibration):
        for target in TARGETS:
            yield convert(name, folder, target, root)


def table(found: list[Cell]) -> str:
    """The matrix and the reasons in Markdown."""
    marks = {"lossless": "=", "dequantize": "float", "requantize": "R", "refused": "-"}
    notes: list[str] = []
    lines = [
        "| from \\ to | " + " | ".join(TARGETS) + " |",
        "|---" * (len(TARGETS) + 1) + "|",
    ]
    for source in SOURCES:
        row = [source]
        for target in TARGETS:
            cell = next(c for c in found if (c.source, c.target) == (source, target))
            mark = marks[cell.kind]
            if cell.reason:
                reason = re.sub(r"\b0\.\d+", "1/127", cell.reason)
                if reason not in notes:
                    notes.append(reason)
                mark += f" <sup>{notes.index(reason) + 1}</sup>"
            row.append(mark)
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines)


def main() -> int:
    """Make the matrix; write it into the page for the tiny model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path, help="text for --model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if options.model is not None:
            for cell in cells(options.model, options.calibration, root):
                print(f"{cell.source:36} {cell.target:20} {cell.kind:10} {cell.reason}", flush=True)
            return 0
        model, tokens = tiny_model(root)
        made = table(list(cells(model, tokens, root)))
    text = PAGE.read_text(encoding="utf-8")
    block = f"<!-- matrix -->\n{made}\n<!-- end of the matrix -->"
    PAGE.write_text(_BLOCK.sub(lambda _: block, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
