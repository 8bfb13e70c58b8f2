"""Files from files: llama-quantize's bytes, importance, splits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantmill.findings import QuantmillError
from quantmill_gguf.container import GgufFile
from quantmill_gguf.encode import decode, encode
from quantmill_gguf.imatrix import COUNTS, Entry, Imatrix
from quantmill_gguf.mixes import MixOptions
from quantmill_gguf.requantize import requantize
from quantmill_gguf.writer import GgufWriter, TensorSpec

DATA = Path(__file__).parent / "data"


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 16


def source(path: Path, *, big: bool = False, kind: str = "F16") -> Path:
    """A model of two layers, one of them with experts."""
    shapes = {
        "token_embd.weight": (40, 256),
        "blk.0.attn_v.weight": (32, 256),
        "blk.0.ffn_down.weight": (16, 512),
        "blk.1.ffn_down_exps.weight": (2, 16, 256),
        "blk.1.ffn_gate_inp.weight": (2, 256),
        "output_norm.weight": (256,),
    }
    metadata = {"general.architecture": "llama", "llama.block_count": 2, "general.name": "x"}
    metadata |= {"general.file_type": 1, "split.count": 1}
    specs = [TensorSpec(n, kind if len(s) > 1 else "F32", s) for n, s in shapes.items()]
    with GgufWriter(path, metadata, specs, big_endian=big) as writer:
        for index, spec in enumerate(specs):
            writer.write(encode(spec.type_name, values(index, *spec.shape)).view(torch.uint8))
    return path


def read(file: GgufFile, name: str) -> torch.Tensor:
    tensor = file.tensors[name]
    raw = torch.frombuffer(bytearray(file.data[tensor.start : tensor.stop]), dtype=torch.uint8)
    width = tensor.type.row_bytes(tensor.shape[-1])
    return decode(tensor.type.name, raw.view(*tensor.shape[:-1], width))


@pytest.mark.parametrize("big", [False, True])
def test_tensors_and_metadata_come_over(tmp_path: Path, big: bool) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "y.gguf"
    types = requantize(
        source(tmp_path / "x.gguf", big=big),
        out,
        "Q8_0",
        MixOptions(overrides=[("ffn_down", "Q4_K")]),
        progress=lambda done, total, what: seen.append((done, total)),
    )
    file = GgufFile.open(out)
    assert {name: item.type.name for name, item in file.tensors.items()} == types
    assert list(types)[:2] == ["output_norm.weight", "token_embd.weight"]
    assert types["blk.0.ffn_down.weight"] == "Q4_K" and types["output_norm.weight"] == "F32"
    assert file.metadata["general.name"] == "x" and file.metadata["general.file_type"] == 7
    assert file.metadata["general.quantization_version"] == 2
    assert "split.count" not in file.metadata
    for index, name in ((0, "token_embd.weight"), (3, "blk.1.ffn_down_exps.weight")):
        shape = file.tensors[name].shape
        assert torch.equal(
            read(file, name), decode("Q8_0", encode("Q8_0", values(index, *shape).half()))
        )
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0


def test_experts_have_importance_of_their_own(tmp_path: Path) -> None:
    name = "blk.1.ffn_down_exps.weight"
    importance = torch.rand(2, 256)
    path, out, file = source(tmp_path / "x.gguf"), tmp_path / "y.gguf", tmp_path / "i.gguf"
    Imatrix({name: Entry(importance * 4, torch.full((2,), 4.0))}, 3, 512, ["/of/some.txt"]).write(
        file
    )
    requantize(path, out, "Q4_K_S", imatrix=file)
    found = read(GgufFile.open(out), name)
    facts = GgufFile.open(out).metadata
    assert {key: facts[f"quantize.imatrix.{key}"] for key in ("file", "dataset")} == {
        "file": "i.gguf",
        "dataset": "some.txt",
    }
    assert [facts[key] for key in COUNTS] == [1, 3]
    for expert in range(2):
        half = values(3, 2, 16, 256).half()[expert]
        kind = GgufFile.open(out).tensors[name].type.name
        wanted = decode(kind, encode(kind, half, importance[expert]))
        assert torch.equal(found[expert], wanted)
    Imatrix({name: Entry(torch.rand(1, 256), torch.ones(1))}).write(file)
    with pytest.raises(QuantmillError, match="QM-GGUF-033"):
        requantize(path, out, "Q4_K_S", imatrix=file)


def test_blocks_are_not_quantized_again_unasked(tmp_path: Path) -> None:
    file, out = DATA / "tiny-Q4_K_M.gguf", tmp_path / "y.gguf"
    with pytest.raises(QuantmillError, match="QM-GGUF-034"):
        requantize(file, out, "Q8_0")
    assert not list(tmp_path.iterdir())
    requantize(file, out, "Q8_0", allow_requantize=True)
    ours, theirs = GgufFile.open(out), GgufFile.open(file)
    name = "blk.0.attn_k.weight"
    assert torch.equal(read(ours, name), decode("Q8_0", encode("Q8_0", read(theirs, name))))


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    path, out = source(tmp_path / "x.gguf"), tmp_path / "y.gguf"
    for options in (MixOptions(output="IQ2_XXS"), MixOptions(overrides=[("attn_v", "IQ1_S")])):
        with pytest.raises(QuantmillError, match="QM-GGUF-009"):
            requantize(path, out, "Q8_0", options)
    assert [item.name for item in tmp_path.iterdir()] == ["x.gguf"]
