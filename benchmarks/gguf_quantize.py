"""A model of 252 million weights into GGUF files, beside ``llama-quantize``.

    python benchmarks/gguf_quantize.py WORK_FOLDER BUILD/bin [--mixes q8_0 q4_k_m] [--json]

Both start from the same BF16 file; ours also from the folder of safetensors. Ours is timed inside a
process that has imported everything, ``llama-quantize`` as a program. They take turns, and the
least of the rounds counts; the files must be the same bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fabricate import fabricate

import quantmill
from quantmill_gguf.requantize import requantize


def least(rounds: int, ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each way, which take turns."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("bins", type=Path, help="folder of llama.cpp's binaries")
    parser.add_argument("--mixes", nargs="*", default=["q8_0", "q4_k_m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = fabricate(options.work / "252m", "252m")
    source = options.work / "252m-bf16.gguf"
    if not source.exists():
        quantmill.quantize(folder, source, "gguf-bf16")
    ours, again, theirs = (options.work / f"made-{who}.gguf" for who in ("ours", "again", "theirs"))
    threads = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for mix in options.mixes:
        command = [options.bins / "llama-quantize", source, theirs, mix, threads]

        def from_folder(mix: str = mix) -> None:
            ours.unlink(missing_ok=True)
            quantmill.quantize(folder, ours, f"gguf-{mix}")

        def from_file(mix: str = mix) -> None:
            requantize(source, again, mix)

        def by_llama(command: list[Any] = command) -> None:
            subprocess.run([*map(str, command)], capture_output=True, check=True)

        seconds = least(
            options.rounds, {"folder": from_folder, "file": from_file, "llama-quantize": by_llama}
        )
        if again.read_bytes() != theirs.read_bytes():
            raise SystemExit(f"{mix}: the files differ")
        row = {"mix": mix, "threads": threads, **seconds}
        for way in ("folder", "file"):
            row[f"{way}_ratio"] = seconds[way] / seconds["llama-quantize"]
        rows.append(row)
        print(
            f"{mix}, {threads} threads: from a folder {seconds['folder']:.2f} s,"
            f" from a file {seconds['file']:.2f} s, llama-quantize"
            f" {seconds['llama-quantize']:.2f} s: {row['folder_ratio']:.2f} and"
            f" {row['file_ratio']:.2f} of its time",
            file=sys.stderr if options.json else sys.stdout,
            flush=True,
        )
    for made in (ours, again, theirs):
        made.unlink(missing_ok=True)
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
