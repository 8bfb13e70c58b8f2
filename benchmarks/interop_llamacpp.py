"""Our GGUF types, mixes and files held against llama.cpp's own binaries, bit for bit.

    python benchmarks/interop_llamacpp.py mixes BUILD/bin [--write FILE]
    python benchmarks/interop_llamacpp.py files BUILD/bin MODEL-F16.gguf [--imatrix FILE]
    python benchmarks/interop_llamacpp.py types BUILD/bin
    python benchmarks/interop_llamacpp.py models BUILD/bin [--only NAME...] [--mixes MIX...]
    python benchmarks/interop_llamacpp.py tokens BUILD/bin

``mixes`` compares the type of every tensor over models of several shapes with what
``llama-quantize`` chooses, and can write its choices as data for the tests. ``files`` writes a
model's file in every mix with both and compares the bytes. ``types`` compares encoders and decoders
with the functions of ``libggml-base`` on random values and on random bytes. ``models`` computes
tiny models of every architecture, in files of every mix that either program writes, with both;
``tokens`` cuts texts by tokenizers of every kind. These two need the bindings of llama-cpp-python
(see ``llamacpp.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llamacpp import Ggml
from torch import Tensor

from quantmill_gguf.encode import MADE, encode
from quantmill_gguf.mixes import MIXES, ModelFacts
from quantmill_gguf.requantize import requantize
from quantmill_gguf.tensor_types import choose, tensor_order
from quantmill_gguf.types import TYPES
from quantmill_gguf.types.sizes import BY_NAME, PLAIN
from quantmill_gguf.writer import GgufWriter, TensorSpec

Shapes = dict[str, tuple[int, ...]]


def model(
    layers: int,
    width: int = 256,
    inner: int = 512,
    *,
    parts: str = "q k v output gate up down",
    head: bool = False,
    experts: int = 0,
) -> Shapes:
    """Names and shapes of the matrices that a mix decides about, and two that it leaves."""
    found: Shapes = {"token_embd.weight": (64, width), "output_norm.weight": (width,)}
    if head:
        found["output.weight"] = (64, width)
    for layer in range(layers):
        block = f"blk.{layer}."
        found[f"{block}attn_norm.weight"] = (width,)
        for part in parts.split():
            if part in ("q", "k", "v", "qkv", "output"):
                found[f"{block}attn_{part}.weight"] = (32, width)
                continue
            shape = (32, inner) if part == "down" else (32, width)
            if experts:
                found[f"{block}ffn_{part}_exps.weight"] = (experts, *shape)
            else:
                found[f"{block}ffn_{part}.weight"] = shape
        if experts:
            found[f"{block}ffn_gate_inp.weight"] = (experts, width)
    return found


LLAMA = {"heads": 4, "kv": 2}
FEW = "k v output down"
CASES: dict[str, tuple[str, dict[str, int], Shapes]] = {
    "novella": ("llama", LLAMA, model(8, 256, 896)),
    "shared heads": ("llama", {"heads": 8, "kv": 2}, model(16, head=True)),
    "narrow": ("llama", {"heads": 9, "kv": 3}, model(30, 576, 1536, parts=FEW)),
    "odd": ("llama", LLAMA, model(8, 72, 100, parts=FEW, head=True)),
    "70B": ("llama", {"heads": 8, "kv": 1}, model(80, parts="v down")),
    "65B": ("llama", {"heads": 8, "kv": 8}, model(80, parts="v down")),
    "eight experts": ("llama", {"heads": 8, "kv": 2, "experts": 8}, model(8, experts=8)),
    "four experts": ("qwen2moe", {"heads": 4, "kv": 4, "experts": 4}, model(8, experts=4)),
    "falcon": (
        "falcon",
        {"heads": 4, "kv": 1},
        model(32, parts="qkv output up down", head=True),
    ),
    "phi3": ("phi3", LLAMA, model(16, parts="qkv output up down", head=True)),
    "qwen2 of 80 layers": ("qwen2", {"heads": 8, "kv": 8}, model(80, parts="v down")),
    "gpt2": ("gpt2", {"heads": 4, "kv": 4}, model(12, parts="qkv output up down")),
}


def metadata_of(case: str) -> dict[str, Any]:
    """Enough for llama.cpp to load the hyperparameters."""
    name, facts, shapes = CASES[case]
    layers = 1 + max(tensor_order(item)[0] for item in shapes)
    width = shapes["token_embd.weight"][1]
    found: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.block_count": layers,
        f"{name}.context_length": 512,
        f"{name}.embedding_length": width,
        f"{name}.feed_forward_length": 512,
        f"{name}.attention.head_count": facts["heads"],
        f"{name}.attention.head_count_kv": facts["kv"],
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.attention.layer_norm_epsilon": 1e-5,
        f"{name}.attention.sliding_window": 0,
    }
    if facts.get("experts"):
        found |= {f"{name}.expert_count": facts["experts"], f"{name}.expert_used_count": 2}
    return found


def theirs_of(binary: Path, file: Path, mix: str, *options: str) -> dict[str, str]:
    """Types that llama-quantize would give, from what it prints."""
    done = subprocess.run(
        [str(binary), "--dry-run", *options, str(file), mix],
        capture_output=True,
        text=True,
        check=False,
    )
    text = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"llama-quantize failed on {file.name} {mix}: {text[-500:]}")
    found = {}
    line = re.compile(r"\[ *\d+/ *\d+\] (\S+).*? type = +(\w+), size = .*?(?:MiB \((\w+)\))?\n")
    for name, kept, made in line.findall(text):
        found[name] = (made or kept).upper()
    return found


def mixes(bins: Path, write: Path | None) -> bool:
    """Compare all tables; with ``write``, store llama.cpp's."""
    good, stored = True, {}
    with tempfile.TemporaryDirectory() as folder:
        for case, (_, _, shapes) in CASES.items():
            metadata = metadata_of(case)
            file = Path(folder) / "model.gguf"
            specs = [TensorSpec(n, "F16" if len(s) > 1 else "F32", s) for n, s in shapes.items()]
            with GgufWriter(file, metadata, specs) as writer:
                for spec in specs:
                    writer.write(torch.zeros(spec.nbytes, dtype=torch.uint8))
            facts = ModelFacts.of(metadata)
            listed = [(spec.name, spec.shape, spec.type_name) for spec in specs]
            order = sorted(shapes, key=tensor_order)
            tables = {}
            for mix in MIXES.values():
                if mix.name == "Q1_0" and any(s[-1] % 128 for s in shapes.values()):
                    continue  # it has no fallback there
                theirs = theirs_of(bins / "llama-quantize", file, mix.name)
                ours = choose(mix, facts, listed)
                wrong = {n: (ours[n], theirs[n]) for n in order if ours[n] != theirs[n]}
                if wrong:
                    good = False
                    print(f"{case}, {mix.name}: {len(wrong)} differ: {list(wrong.items())[:4]}")
                tables[mix.name] = [theirs[name] for name in order]
            print(f"{case}: {len(tables)} mixes of {len(order)} tensors compared")
            stored[case] = {
                "facts": list(dataclasses.astuple(facts)),
                "tensors": {name: shapes[name] for name in order},
                "types": tables,
            }
    if write is not None:
        write.write_text(json.dumps(packed(stored), separators=(",", ":")) + "\n")
    return good


def packed(stored: dict[str, Any]) -> dict[str, Any]:
    """Types as letters into one list, a text for each mix."""
    names = sorted({t for c in stored.values() for row in c["types"].values() for t in row})
    letters = {name: chr(ord("a") + index) for index, name in enumerate(names)}
    for case in stored.values():
        case["types"] = {
            mix: "".join(letters[item] for item in row) for mix, row in case["types"].items()
        }
    return {"letters": {letter: name for name, letter in letters.items()}, "cases": stored}


def files(bins: Path, source: Path, imatrix: Path | None) -> bool:
    """Whole files, byte by byte."""
    good, given = True, []
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
        if imatrix is not None:
            # Its name is written into files, without its folder by us.
            shutil.copy(imatrix, folder)
            given = ["--imatrix", imatrix.name]
        for mix in MIXES:
            start = time.perf_counter()
            requantize(source, ours, mix, imatrix=imatrix)
            middle = time.perf_counter()
            command = [bins.resolve() / "llama-quantize", *given, source.resolve(), theirs, mix, 2]
            done = subprocess.run(
                [*map(str, command)], capture_output=True, text=True, check=False, cwd=folder
            )
            end = time.perf_counter()
            if done.returncode:
                print(f"{mix}: llama-quantize refuses: {done.stderr.strip()[-120:]!r}")
                continue
            same = ours.read_bytes() == theirs.read_bytes()
            good &= same
            words = "the same bytes" if same else "DIFFERENT"
            print(
                f"{mix}: {words}, {ours.stat().st_size} bytes, ours {middle - start:.2f} s,"
                f" theirs {end - middle:.2f} s",
                flush=True,
            )
    return good


def samples(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Values of several kinds, ``[rows, 1024]``."""
    for scale in (1.0, 0.02, 1e-6, 1e-20, 300.0):
        yield f"normal x {scale:g}", torch.randn(48, 1024, generator=generator) * scale
    heavy = torch.randn(48, 1024, generator=generator) * torch.randn(48, 1024).exp()
    yield "heavy tails", heavy
    yield "few levels", torch.randint(-3, 4, (48, 1024), generator=generator).float()
    sparse = heavy * (torch.rand(48, 1024, generator=generator) < 0.03)
    yield "sparse", sparse
    yield "positive", heavy.abs()
    yield "negative", -heavy.abs()
    yield "constant", torch.tensor([0.37, -2.0, 1e-30, 6e4]).unsqueeze(1).expand(4, 1024)
    yield "zero", torch.tensor([0.0, -0.0]).unsqueeze(1).expand(2, 1024)
    signs = torch.randint(0, 2, (8, 1024), generator=generator).float() * 2 - 1
    yield "zeros of both signs", signs * 0.0
    yield "two values", signs * 0.02
    outliers = torch.randn(48, 1024, generator=generator) * 0.02
    outliers[:, ::200] *= 500.0
    yield "outlying columns", outliers
    single = torch.randn(48, 1024, generator=generator) * 0.02
    single[::2, 77] = 40.0
    single[1::2, 300] = -3e4
    yield "outlying values", single
    yield "one value in zeros", torch.eye(48, 1024) * 0.5
    yield "denormal", torch.randn(48, 1024, generator=generator) * 1e-41
    yield "float16's smallest", torch.randn(48, 1024, generator=generator) * 6e-8
    steps = torch.arange(1024).expand(2, 1024) / 64 * torch.tensor([[1.0], [-1.0]])
    yield "even steps", steps


def types(bins: Path) -> bool:
    """Encoders and decoders."""
    ggml, generator, good = Ggml(bins), torch.Generator().manual_seed(0), True
    for name in (item for item in MADE if item not in PLAIN):
        compared = 0
        for words, values in samples(generator):
            weights = torch.rand(1024, generator=generator) ** 4
            some = weights * (torch.rand(1024, generator=generator) < 0.5)
            for importance in (None, weights, some) if TYPES[name].weighs else (None,):
                ours = encode(name, values, importance)
                theirs = ggml.encode(name, values, importance)
                compared += ours.numel()
                if not torch.equal(ours, theirs):
                    good = False
                    kind = "with" if importance is not None else "without"
                    count = int((ours != theirs).sum())
                    print(f"{name}: {words}, {kind} importance: {count} bytes DIFFER")
        print(f"{name}: {compared} bytes of encoders compared", flush=True)
    for name in (item for item in TYPES if item not in PLAIN):
        size = (512, 8 * BY_NAME[name].size)
        raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        ours, theirs = TYPES[name].decode(raw), ggml.decode(name, raw)
        bits = ours.view(torch.int32) == theirs.view(torch.int32)
        same = bool((bits | (ours.isnan() & theirs.isnan())).all())
        good &= same
        nans = int(theirs.isnan().sum())
        words = "bit-equal" if same else "DIFFERENT"
        print(f"{name}: decoding {words}, {ours.numel()} values, {nans} of them NaN")
    return good


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("what", choices=("mixes", "files", "types", "models", "tokens"))
    parser.add_argument("bins", type=Path, help="folder of llama.cpp's binaries and libraries")
    parser.add_argument("model", type=Path, nargs="?", help="a float GGUF file, for files")
    parser.add_argument("--imatrix", type=Path, help="an importance matrix of the model, for files")
    parser.add_argument("--write", type=Path, help="where mixes stores llama.cpp's choices")
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of models (quantmill_gguf.tiny)"
    )
    parser.add_argument("--mixes", nargs="*", default=[], help="mixes of models, in place of all")
    arguments = parser.parse_args()
    if arguments.what == "mixes":
        good = mixes(arguments.bins, arguments.write)
    elif arguments.what == "files":
        good = files(arguments.bins, arguments.model, arguments.imatrix)
    elif arguments.what == "models":
        from llamacpp_models import models

        good = models(arguments.bins, arguments.only, arguments.mixes)
    elif arguments.what == "tokens":
        from llamacpp_tokens import tokens

        good = tokens(arguments.bins)
    else:
        good = types(arguments.bins)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
