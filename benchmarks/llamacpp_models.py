"""Models of every architecture, in files of ours and of llama.cpp's, computed by both.

For each model and mix: its file written by us and the one that ``llama-quantize`` writes. Both are
computed by us, packed; by llama.cpp, which rounds activations and so comes near only; and, for a
tight comparison, by llama.cpp from the floats that ``llama-quantize`` makes of the file.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from llamacpp import Llama
from torch import Tensor

import quantmill
from quantmill_gguf import tiny
from quantmill_gguf.imatrix import Entry, Imatrix
from quantmill_gguf.mixes import MIXES
from quantmill_gguf.requantize import requantize

READ_ONLY: Final = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
)
"""Mixes that we read only; ``llama-quantize`` wants an importance matrix for most."""
TYPES: Final = ("nvfp4", "mxfp4", "q1_0", "q2_0", "iq1_m", "iq3_s", "q8_0", "bf16")
"""Types that are also given to all matrices alike."""
_PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 150000.0}
OPTIONS: Final[Mapping[str, dict[str, Any]]] = {"gpt-oss": {"rope_parameters": _PLAIN_ROTARY}}
"""llama.cpp rounds the corrections of this model's rotary embedding to whole dimensions, and the
model does not: it is compared without them."""
_UNSCALED: Final = ("t5", "umt5")
"""llama.cpp does not scale the logits of a head that is the embedding."""
TIGHT, GELU, NEAR = 2e-5, 3e-3, 0.35
"""Relative distances: of float32; of activations that ggml looks up in a table of float16; of
activations that are rounded to 8 bits."""
_TABLED = ("gemma", "gpt2", "starcoder2", "falcon", "bloom", "flan-t5", "umt5", "qwen3.5")
_LOUD: Final = ("t5", "flan-t5", "umt5")
"""T5 does not scale what its softmax takes: what is rounded comes out larger."""
_WIDER: Final = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "n_embd", "d_model", "d_ff"),
    *("shared_expert_intermediate_size", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("num_heads", "hidden_size_per_layer_input", "num_kv_heads", "num_global_key_value_heads"),
)


def wide(name: str) -> dict[str, Any]:
    """Options that make rows of a tiny model whole blocks of 256."""
    options = tiny.MODELS[name][2]
    return {key: 8 * options[key] for key in _WIDER if options.get(key)}


def quantized(bins: Path, source: Path, out: Path, kind: str, *options: str) -> Path:
    """A file by ``llama-quantize``."""
    command = [bins / "llama-quantize", *options, source, out, kind, 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "fail" in line or "error" in line]
        raise ValueError(f"llama-quantize refuses: {' '.join(told)[-200:]}")
    return out


class Comparison:
    """One model; counts what is wrong, and says it."""

    def __init__(self, llama: Llama, bins: Path, name: str, folder: Path) -> None:
        self.llama, self.bins, self.name, self.folder = llama, bins, name, folder
        self.failed = 0
        self.worst: dict[str, float] = {}
        self.width = 0
        loud = name in _LOUD
        self.tight = (GELU if name.startswith(_TABLED) else TIGHT) * (5 if loud else 1)
        self.near = NEAR * (2 if loud else 1)

    def computed(self, file: Path) -> tuple[Tensor, Tensor]:
        """Our logits and llama.cpp's of a file."""
        ours = tiny.logits(quantmill.load(file, dtype="float32"))[0]
        return ours, self.theirs(file)

    def theirs(self, file: Path) -> Tensor:
        """llama.cpp's logits, as the model scales them."""
        found = self.llama.logits(file, tiny.IDS[0].tolist(), tiny.IDS[0, :12].tolist())
        return found * self.width**-0.5 if self.name in _UNSCALED else found

    def hold(self, what: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
        """A distance, which must be below the limit."""
        far = tiny.far(ours, theirs)
        kind = what.rpartition(": ")[2]
        self.worst[kind] = max(self.worst.get(kind, 0.0), far)
        if not far < limit:
            self.fail(f"{what}: {far:.2g} apart, {limit:g} is the limit")

    def fail(self, words: str) -> None:
        self.failed += 1
        print(f"  {self.name}, {words}", flush=True)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """A refusal is a failure of what was tried."""
        try:
            work()
        except (ValueError, quantmill.QuantmillError) as error:
            self.fail(f"{what}: {str(error)[:300]}")

    def file(self, what: str, file: Path) -> None:
        """A quantized file, read by both."""
        ours, theirs = self.computed(file)
        floats = self.folder / "floats.gguf"
        quantized(self.bins, file, floats, "F32", "--allow-requantize")
        self.hold(f"{what}: decoded", ours, self.theirs(floats), self.tight)
        self.hold(f"{what}: rounding", ours, theirs, self.near)

    def run(self, mixes: Iterable[str], more: Mapping[str, Any]) -> None:
        model = tiny.make(self.name, **more)
        self.width = getattr(model.config, "d_model", model.config.hidden_size)
        source, floats = self.folder / "hf", self.folder / "f32.gguf"
        tiny.save(model, source)
        quantmill.quantize(source, floats, "gguf:type=F32")
        ours, theirs = self.computed(floats)
        self.hold("F32: from the folder", ours, tiny.logits(model)[0], TIGHT)
        self.hold("F32: llama.cpp", ours, theirs, self.tight)
        matrix = self.matrix(floats)
        for mix in mixes:
            out = self.folder / "out.gguf"
            if mix in MIXES:
                self.attempt(f"{mix} by us", lambda mix=mix, out=out: self.ours(mix, out))
            self.attempt(
                f"{mix} by llama.cpp",
                lambda mix=mix, out=out: self.file(
                    f"{mix} by llama.cpp",
                    quantized(self.bins, floats, out, mix, "--imatrix", str(matrix)),
                ),
            )

    def types(self) -> None:
        """Types that no mix has, or none alone."""
        floats, out = self.folder / "f32.gguf", self.folder / "out.gguf"
        matrix = str(self.folder / "imatrix.gguf")
        for kind in TYPES:
            given = ["--pure", "--imatrix", matrix, "--tensor-type", f".*={kind}"]
            head = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
            self.attempt(
                f"all {kind}",
                lambda kind=kind, given=given, head=head: self.file(
                    f"all {kind}", quantized(self.bins, floats, out, "Q8_0", *given, *head)
                ),
            )

    def ours(self, mix: str, out: Path) -> None:
        """Of the folder and of the float file, which must give the same blocks."""
        out.unlink(missing_ok=True)
        quantmill.quantize(self.folder / "hf", out, f"gguf-{mix.lower()}")
        self.file(f"{mix} by us", out)
        requantize(self.folder / "f32.gguf", self.folder / "again.gguf", mix)
        self.file(f"{mix} by us of a file", self.folder / "again.gguf")

    def matrix(self, floats: Path) -> Path:
        """An importance matrix of chance for every matrix of a file."""
        from quantmill_gguf.container import GgufFile

        generator, entries = torch.Generator().manual_seed(0), {}
        for name, tensor in GgufFile.open(floats).tensors.items():
            if len(tensor.shape) > 1:
                parts = tensor.shape[0] if len(tensor.shape) > 2 else 1
                sums = torch.rand(parts, tensor.shape[-1], generator=generator) + 0.1
                entries[name] = Entry(sums, torch.ones(parts))
        path = self.folder / "imatrix.gguf"
        Imatrix(entries, 1, 512, ["chance"]).write(path)
        return path


def models(bins: Path, names: Iterable[str], mixes: Iterable[str]) -> bool:
    """Compare models; all of them with all mixes where none is named."""
    llama, good = Llama(bins), True
    mixes = [*mixes] or [*MIXES, *READ_ONLY]
    for name in [*names] or tiny.MODELS:
        for kind, more in (("tiny", {}), ("wide", wide(name))):
            if kind == "wide" and name == "phi3-long":
                continue  # Its factors are of the narrow head.
            with tempfile.TemporaryDirectory() as folder:
                compared = Comparison(llama, bins, name, Path(folder))
                given = {**more, **OPTIONS.get(name, {})}
                compared.run(mixes if kind == "wide" else ("Q8_0", "Q4_K_M"), given)
                if kind == "wide":
                    compared.types()
            worst = ", ".join(f"{key} {value:.1e}" for key, value in compared.worst.items())
            print(
                f"{name} ({kind}): {compared.failed} failures; apart at most: {worst}", flush=True
            )
            good &= not compared.failed
    return good
