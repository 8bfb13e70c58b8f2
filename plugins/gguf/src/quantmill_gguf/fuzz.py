"""A fuzz target over the reader: damaged headers are refused with a finding, or read.

``python -m quantmill_gguf.fuzz --count 1000000`` damages headers of small files of every kind in
memory and reads each: container, translation to transformers' names, tokenizer, tensors. It
reports how many were refused, and the memory above that of the imports. Anything but a
:class:`~quantmill.findings.QuantmillError` ends it with the bytes that did it in ``--keep``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from quantmill.findings import QuantmillError
from quantmill_gguf.container import Array, parse
from quantmill_gguf.reader import headers_of
from quantmill_gguf.testing import matrices, write
from quantmill_gguf.types import TYPES
from quantmill_gguf.vocab.read import tokenizer_of

__all__ = ["damaged", "execute", "main", "run", "seeds"]

_PATH: Final = Path("fuzzed.gguf")
_NUMBERS: Final = (0, 1, 2, 3, 31, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
_BASE: Final[dict[str, Any]] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 64,
    "feed_forward_length": 64,
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 64,
    "shortconv.l_cache": 4,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 8,
    "ssm.time_step_rank": 4,
    "attention.key_length": 32,
    "attention.relative_buckets_count": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
_DELTA: Final[dict[str, Any]] = {
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "rope.dimension_sections": [3, 3, 2, 0],
}
_WINDOWS: Final[dict[str, Any]] = {
    "attention.key_length": 32,
    "attention.key_length_swa": 16,
    "attention.head_count_kv": [2, 2],
    "attention.sliding_window_pattern": [True, False],
    "feed_forward_length": [64, 64],
}
_SPM: Final[dict[str, Any]] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab", "<0x0A>"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, 0.0],
    "tokenizer.ggml.token_type": [2, 1, 1, 1, 6],
    "tokenizer.ggml.bos_token_id": 1,
}
_BPE: Final[dict[str, Any]] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
}
_UNIGRAM: Final[dict[str, Any]] = {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "\u2581a"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0],
    "tokenizer.ggml.precompiled_charsmap": [0, 0, 0, 0],
}
_KINDS: Final = {"tokenizer.ggml.precompiled_charsmap": "uint8"}


def _model(
    arch: str, vocabulary: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    keys = {f"{arch}.{key}": value for key, value in {**_BASE, **(more or {})}.items()}
    return {"general.architecture": arch, **keys, **vocabulary}


def seeds() -> list[tuple[bytes, int]]:
    """Whole files, and where the header of each ends."""
    raw = torch.zeros(64, 2 * TYPES["Q8_0"].info.size, dtype=torch.uint8)
    plain = torch.ones(1, 16).view(torch.uint8)
    dense = {
        "blk.0.attn_q.weight": ("Q8_0", raw),
        "blk.0.attn_norm.weight": ("F32", plain),
        "token_embd.weight": ("Q8_0", raw),
        "rope_freqs.weight": ("F32", plain),
    }
    stacked = {
        "blk.0.ffn_gate_exps.weight": ("Q8_0", raw),
        "blk.0.ffn_gate_inp.weight": ("F32", plain),
        "blk.0.attn_qkv.weight": ("Q8_0", raw),
        "token_embd.weight": ("Q8_0", raw),
    }
    rows = TYPES["Q8_0"].info.size * 2
    fused = {
        "blk.0.attn_qkv.weight": ("Q8_0", torch.zeros(192, rows, dtype=torch.uint8)),
        "token_embd.weight": ("Q8_0", raw),
    }
    wide = torch.zeros(128, rows, dtype=torch.uint8)
    mixers = {
        "blk.0.ssm_a": ("F32", torch.full((4, 1), -1.0).view(torch.uint8)),
        "blk.0.ssm_conv1d.weight": ("F32", torch.ones(128, 4).view(torch.uint8)),
        "blk.0.attn_qkv.weight": ("Q8_0", wide),
        "blk.0.ssm_out.weight": ("Q8_0", raw),
        "blk.1.shortconv.conv.weight": ("F32", torch.ones(64, 4).view(torch.uint8)),
        "token_embd.weight": ("Q8_0", raw),
    }
    more: dict[str, Any] = {"expert_count": 2, "expert_used_count": 1}
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    wanted: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        (matrices(), {}, {}),
        (matrices(), {}, {"big_endian": True}),
        (matrices(), {}, {"version": 2}),
        (dense, _model("llama", _SPM), {}),
        (stacked, _model("llama", _UNIGRAM, more), {}),
        (stacked, _model("qwen2moe", _BPE, more), {"big_endian": True}),
        (stacked, _model("qwen3moe", _SPM, {**scaled, **more}), {"version": 2}),
        (fused, _model("falcon", _BPE), {}),
        (mixers, _model("mamba", _BPE), {}),
        (mixers, _model("lfm2", _BPE, {"attention.head_count_kv": [1, 0]}), {}),
        (mixers, _model("qwen35", _BPE, _DELTA), {}),
        (mixers, _model("qwen35moe", _BPE, {**_DELTA, **more}), {}),
        (dense, _model("gemma4", _SPM, _WINDOWS), {}),
    ]
    for arch in ("t5", "gpt-oss", "minimax-m2", "gemma3", "nemotron", "gpt2", "phi3"):
        tensors = stacked if arch in ("gpt-oss", "minimax-m2") else dense
        wanted.append((tensors, _model(arch, _BPE, more if tensors is stacked else {}), {}))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (tensors, metadata, options) in enumerate(wanted):
            if metadata:
                options = {**options, "metadata": metadata, "kinds": _KINDS}
            path = write(Path(folder) / f"{index}.gguf", tensors, **options)
            data = path.read_bytes()
            first = min(item.start for item in parse(data, path).tensors.values())
            found.append((data, first))
    return found


def damaged(data: bytes, end: int, source: random.Random) -> bytearray:
    """The file with its first ``end`` bytes damaged, perhaps cut off."""
    work = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 8))):
        where = source.randrange(min(end, len(work)) or 1)
        how = source.randrange(6)
        if how == 0:
            work[where : where + 1] = bytes([source.randrange(256)])
        elif how == 1 and where < len(work):
            work[where] ^= 1 << source.randrange(8)
        elif how == 2:
            work[where : where + 8] = struct.pack("<Q", source.choice(_NUMBERS))
        elif how == 3:
            work[where : where + 4] = struct.pack("<I", source.choice(_NUMBERS) & 0xFFFFFFFF)
        elif how == 4:
            del work[where : where + source.randrange(1, 40)]
        else:
            piece = source.randrange(end)
            work[where:where] = work[piece : piece + source.randrange(1, 40)]
    if source.random() < 0.1:
        del work[source.randrange(len(work) + 1) :]
    return work


def execute(data: bytearray, deep: bool) -> str:
    """Read a file; ``deep`` reads its tensors and tokenizer too.

    Returns:
        The code of the finding, or ``read``.
    """
    try:
        file = parse(data, _PATH)
        headers = headers_of([file], _PATH)
    except QuantmillError as error:
        return error.findings[0].code
    for tensor in file.tensors.values():
        assert tensor.start <= tensor.stop <= len(data)
    if deep:
        for value in file.metadata.values():
            if isinstance(value, Array):
                assert sum(1 for _ in value) == len(value)
        try:
            tokenizer_of(file.metadata, _PATH.name)
        except QuantmillError as error:
            return error.findings[0].code
        with headers.source.reader(headers) as reader:  # type: ignore[attr-defined]
            for name, item in headers.tensors.items():
                assert tuple(reader.tensor(name).shape) == tuple(item.shape), name
    return "read"


def run(count: int, seed: int = 0, deep_every: int = 8, keep: Path | None = None) -> Counter[str]:
    """``count`` executions: how often each outcome was seen."""
    source = random.Random(seed)
    files = seeds()
    seen: Counter[str] = Counter()
    for number in range(count):
        work = damaged(*source.choice(files), source)
        try:
            seen[execute(work, deep=number % deep_every == 0)] += 1
        except BaseException:
            if keep is not None:
                keep.write_bytes(work)
            raise
    return seen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m quantmill_gguf.fuzz")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where the bytes of a failure go")
    options = parser.parse_args(arguments)
    run(20, options.seed)  # What is imported late is imported now.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    seen = run(options.count, options.seed, keep=options.keep)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {
        "executions": options.count,
        "seed": options.seed,
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(seen.most_common()),
        "memory_above_imports_mib": round((peak - before) / 1024, 1),
        "largest_file_mib": round(max(len(data) for data, _ in seeds()) / 2**20, 3),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
