"""Folders of ours in vLLM's own config parsers and loaders, on a machine without a GPU.

    python benchmarks/interop_vllm.py WORK --peer-python PYTHON

PYTHON is that of an environment with vLLM, ``vllm-bnb-plugin``, ``vllm-gguf-plugin`` and Triton
(vLLM 0.33 was tried: its wheel imports beside a CPU build of torch). ``vllm_reader.py`` runs there:
it makes vLLM's model from each folder's config, loads the tensors with vLLM's loaders, and holds
what they hold against the folder. Kernels aren't run.

It fails where vLLM refuses a folder that docs/vllm.md says it reads, or reads one it says it
doesn't, where a parameter is left unfilled, and where one differs from the folder's tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import quantmill
from quantmill_transformers.testing import write

READ = {
    "gptq-4": "auto_gptq",
    "gptq-8": "auto_gptq",
    "awq-4": "auto_awq",
    "bnb-nf4": "bitsandbytes",
    "bnb-nf4-dq": "bitsandbytes",
    "bnb-fp4": "bitsandbytes",
    "bnb-int8": "bitsandbytes",
    "fp8-block": "fp8",
    "fp8-row": "fbgemm_fp8",
    "ct-int4": "compressed-tensors",
    "ct-int4-asym": "compressed-tensors",
    "ct-int8": "compressed-tensors",
    "ct-int8-dynamic": "compressed-tensors",
    "ct-fp8": "compressed-tensors",
    "ct-fp8-dynamic": "compressed-tensors",
    "ct-nvfp4": "compressed-tensors",
    "ct-mxfp4": "compressed-tensors",
    "ct-mxfp8": "compressed-tensors",
    "torchao-int8wo": "torchao",
    "torchao-float8wo": "torchao",
    "gguf-q4_k_m": "gguf",
    "gguf-q8_0": "gguf",
}
"""Methods that this vLLM reads, and the name that it has for their quantization."""
EXPERTS = ("gptq-4", "awq-4", "bnb-nf4", "fp8-block", "ct-int4", "ct-fp8-dynamic")
"""Of those, written for mixtures too: vLLM makes one tensor of the experts of a projection."""
MIXTURES = ("mixtral", "qwen3-moe")
WIDE: dict[str, dict[str, int]] = {
    "mixtral": {"intermediate_size": 512},
    "qwen3-moe": {"intermediate_size": 512, "moe_intermediate_size": 256},
}
REFUSED = {
    "gptq-3": "bits",
    "gptq-4:sym=false": "sym",
    "gptq-4:desc_act=true": "desc_act",
    "hqq-4": "hqq",
    "quanto-int8": "quanto",
}
"""Methods that it doesn't, and a word of what it says."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    outputs: dict[Path, tuple[str, str]] = {}
    novella = Path(__file__).parent.parent / "models" / "novella"
    for method in [*READ, *REFUSED]:
        outputs[_write(novella, options.work / f"{len(outputs):02}", method)] = ("novella", method)
    for family in MIXTURES:
        source = options.work / family
        write(family, source, dtype=torch.bfloat16, hidden_size=256, head_dim=64, **WIDE[family])
        for method in EXPERTS:
            outputs[_write(source, options.work / f"{len(outputs):02}", method)] = (family, method)
    rows = []
    for row, (model, method) in zip(
        _read(options.peer_python, list(outputs)), outputs.values(), strict=True
    ):
        rows.append({"model": model, "method": method, **row})
    failed = False
    for row in rows:
        fine, line = _judge(row)
        failed |= not fine
        print(f"{'ok    ' if fine else 'FAILED'} {row['model']:9} {row['method']:20} {line}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(failed)


def _write(source: Path, output: Path, method: str) -> Path:
    """Quantize ``source`` into a folder; what vLLM is to be given of it."""
    tokens = torch.randint(0, 96, (32, 64), generator=torch.Generator().manual_seed(0))
    if method.startswith("gguf"):
        # vLLM takes the config and the tokenizer from the folder that the file is in.
        output.mkdir()
        for path in source.glob("*.json"):
            shutil.copy(path, output)
        output /= f"{output.name}.gguf"
    calibration = tokens if method.startswith(("gptq", "awq")) else None
    quantmill.quantize(source, output, method, calibration=calibration)
    return output


def _read(python: str, outputs: list[Path]) -> list[dict[str, Any]]:
    command = [python, str(Path(__file__).with_name("vllm_reader.py")), *map(str, outputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _judge(row: dict[str, Any]) -> tuple[bool, str]:
    """Whether the row is as expected, and what to print of it."""
    method = row["method"]
    if "error" in row:
        said = " ".join(row["error"])
        expected = method in REFUSED and REFUSED[method] in said
        return expected, f"refused: {said[:110]}"
    bad = row["missing"] or row["different"]
    line = f"{row['quantization']}: {row['parameters']} parameters, {row['same']} held and equal"
    if bad:
        line += f", missing {row['missing'][:3]}, different {row['different'][:3]}"
    return not bad and READ.get(method) == row["quantization"], line


if __name__ == "__main__":
    sys.exit(main())
