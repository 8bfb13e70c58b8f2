"""Importance matrices: llama.cpp's files, read and written again; damaged ones; use in a job."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_llama
from quantmill_gguf.container import GgufFile
from quantmill_gguf.encode import encode
from quantmill_gguf.imatrix import Entry, Imatrix
from quantmill_gguf.writer import GgufWriter, TensorSpec

DATA = Path(__file__).parent / "data"
"""``imatrix.*`` are llama-imatrix's, of one model and text, in both formats."""


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_files_of_llama_cpp_are_read_and_written_again(name: str, tmp_path: Path) -> None:
    found = Imatrix.read(DATA / name)
    assert len(found.entries) == 14 and found.chunks == 18
    assert found.texts == ["imatrix_text.txt"]
    assert found.entries["blk.1.ffn_down.weight"].mean().shape == (1, 512)
    found.write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    newer, older = Imatrix.read(DATA / "imatrix.gguf"), Imatrix.read(DATA / "imatrix.dat")
    assert newer.entries.keys() == older.entries.keys()
    for name, entry in newer.entries.items():
        torch.testing.assert_close(entry.mean(), older.entries[name].mean(), rtol=1e-6, atol=0)
    newer.write(tmp_path / "x.dat")
    assert (tmp_path / "x.dat").read_bytes() == (DATA / "imatrix.dat").read_bytes()


EXPERTS = Entry(torch.tensor([[2.0, 4.0], [0.0, 0.0], [9.0, 3.0]]), torch.tensor([2.0, 0.0, 3.0]))


def test_an_expert_without_tokens_weighs_all_alike(tmp_path: Path) -> None:
    mean = torch.tensor([[1.0, 2.0], [1.0, 1.0], [3.0, 1.0]])
    matrix = Imatrix({"experts": EXPERTS}, 3, 1, ["text"])
    for name in ("x.gguf", "x.dat"):
        matrix.write(tmp_path / name)
        found = Imatrix.read(tmp_path / name)
        assert torch.equal(found.entries["experts"].mean().reshape(3, 2), mean)
        assert (found.chunks, found.texts) == (3, ["text"])


def test_the_other_byte_order_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", {"a.in_sum2": torch.tensor([4.0, 6.0]), "a.counts": ONE}, big=True)
    assert Imatrix.read(tmp_path / "x.gguf").entries["a"].mean().tolist() == [[2.0, 3.0]]


ONE = torch.tensor([2.0])


def write(
    path: Path, tensors: Mapping[str, Tensor], *, kind: str = "imatrix", big: bool = False
) -> Path:
    specs = [
        TensorSpec(name, "F16" if item.dtype == torch.float16 else "F32", tuple(item.shape))
        for name, item in tensors.items()
    ]
    with GgufWriter(path, {"general.type": kind}, specs, big_endian=big) as writer:
        for item in tensors.values():
            writer.write(item.contiguous().view(torch.uint8))
    return path


SUMS = {"a.in_sum2": torch.tensor([4.0, 6.0]), "a.counts": ONE}
BAD: dict[str, tuple[str, Mapping[str, Tensor]]] = {
    "'model', not 'imatrix'": ("model", SUMS),
    "no entry": ("imatrix", {"other": ONE}),
    "lacks its .counts": ("imatrix", {"a.in_sum2": ONE}),
    "lacks its .in_sum2": ("imatrix", {"a.counts": ONE}),
    "not F32": ("imatrix", {**SUMS, "a.in_sum2": torch.ones(2, dtype=torch.float16)}),
    "2 sums for 3 counts": ("imatrix", {**SUMS, "a.counts": torch.ones(3)}),
    "0 sums for 1 counts": ("imatrix", {**SUMS, "a.in_sum2": torch.ones(0)}),
    "2 sums for 0 counts": ("imatrix", {**SUMS, "a.counts": torch.ones(0)}),
    "value that is negative": ("imatrix", {**SUMS, "a.in_sum2": torch.tensor([1.0, -1.0])}),
    "NaN or infinite": ("imatrix", {**SUMS, "a.in_sum2": torch.tensor([1.0, float("nan")])}),
    "count that is negative": ("imatrix", {**SUMS, "a.counts": torch.tensor([-1.0])}),
}


@pytest.mark.parametrize("words", BAD)
def test_what_a_file_can_not_say(words: str, tmp_path: Path) -> None:
    kind, tensors = BAD[words]
    refused(lambda: Imatrix.read(write(tmp_path / "x.gguf", tensors, kind=kind)), words)


def older(*entries: tuple[bytes, int, int, bytes], count: int | None = None) -> bytes:
    parts = [struct.pack("<i", len(entries) if count is None else count)]
    for name, calls, values, raw in entries:
        parts.append(struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, values) + raw)
    return b"".join(parts)


FLOATS = struct.pack("<2f", 1.0, 2.0)
BAD_OLDER = {
    "": b"",
    "no importance matrix": b"lorem ipsum dolor sit amet",
    "claims 0 entries": older(),
    "claims -1 entries": older(count=-1),
    "claims 2147483647 entries": older((b"a", 1, 2, FLOATS), count=2**31 - 1),
    "has 0 values": older((b"a", 1, 0, FLOATS)),
    "has -3 values": older((b"a", 1, -3, FLOATS)),
    "2 values of -1 calls": older((b"a", -1, 2, FLOATS)),
    "ends early": older((b"a", 1, 2**29, FLOATS)),
    "is there twice": older((b"a", 1, 2, FLOATS), (b"a", 1, 2, FLOATS)),
    "NaN or infinite": older((b"a", 1, 1, struct.pack("<f", float("inf")))),
    "the name of entry 0": struct.pack("<ii", 1, -7) + bytes(16),
}


@pytest.mark.parametrize("words", BAD_OLDER)
def test_what_an_older_file_can_not_say(words: str, tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(BAD_OLDER[words])
    refused(lambda: Imatrix.read(tmp_path / "x.dat"), words)


def test_older_files_may_end_after_their_entries(tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(older((b"a", 0, 2, FLOATS)))
    found = Imatrix.read(tmp_path / "x.dat")
    assert found.chunks == 0 and found.entries["a"].mean().tolist() == [[1.0, 2.0]]


def test_no_damage_escapes_the_checks(tmp_path: Path) -> None:
    path, dice = tmp_path / "x", random.Random(0)
    for name in ("imatrix.dat", "imatrix.gguf"):
        whole = (DATA / name).read_bytes()
        for turn in range(300):
            data = bytearray(whole[: dice.randrange(len(whole))] if turn % 2 else whole)
            for _ in range(dice.randrange(4)):
                if data:
                    data[dice.randrange(min(len(data), 2000))] = dice.choice((0, 255, 128, 1))
            path.write_bytes(data)
            with contextlib.suppress(QuantmillError):
                Imatrix.read(path)


def refused(call: Callable[[], object], words: str, code: str = "QM-GGUF-033") -> None:
    with pytest.raises(QuantmillError) as caught:
        call()
    assert caught.value.findings[0].code == code
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(lambda: Imatrix.read(tmp_path / "none.gguf"), "none.gguf")
    refused(lambda: Imatrix.read(tmp_path), "can't be opened")


# ---- In a job ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder, hidden=64, inner=96)
    return folder


NAMES = [
    f"blk.{layer}.{part}.weight"
    for layer in range(2)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
]


def matrix(path: Path, names: list[str] = NAMES, width: int = 64) -> Path:
    entries = {}
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(index)
        columns = 96 if "ffn_down" in name else width
        entries[name] = Entry(torch.rand(1, columns, generator=generator) ** 4, torch.ones(1))
    Imatrix(entries, 7, 16, ["some/text.txt"]).write(path)
    return path


def test_blocks_are_weighed_by_it(model: Path, tmp_path: Path) -> None:
    path = matrix(tmp_path / "imatrix.dat")
    report = quantmill.quantize(model, tmp_path / "x.gguf", "gguf-q4_1", imatrix=path)
    assert not any(item.code in ("QM-GGUF-033", "QM-GGUF-035") for item in report.plan.findings)
    quantmill.quantize(model, tmp_path / "plain.gguf", "gguf-q4_1")
    file, plain = (GgufFile.open(tmp_path / name) for name in ("x.gguf", "plain.gguf"))
    importance = Imatrix.read(path).entries
    loaded: Any = quantmill.load(model)
    for name in ("blk.1.ffn_down.weight", "blk.0.attn_output.weight"):
        tensor = file.tensors[name]
        layer, part = name.split(".")[1:3]
        module = {"ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}[part]
        weight = loaded.get_submodule(f"model.layers.{layer}.{module}").weight.detach()
        wanted = encode("Q4_1", weight, importance[name].mean()[0])
        assert bytes(file.data[tensor.start : tensor.stop]) == wanted.numpy().tobytes()
        assert bytes(plain.data[tensor.start : tensor.stop]) != wanted.numpy().tobytes()
    keys = {key: value for key, value in file.metadata.items() if "imatrix" in key}
    assert keys == {
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": 14,
        "quantize.imatrix.chunks_count": 7,
    }
    assert not any("imatrix" in key for key in plain.metadata)


def test_a_model_in_memory_is_weighed_too(model: Path, tmp_path: Path) -> None:
    path = matrix(tmp_path / "imatrix.gguf")
    quantmill.quantize(model, tmp_path / "x.gguf", "gguf-q4_1", imatrix=path)
    method = {"method": "gguf-q4_1", "imatrix": str(path)}
    ours: Any = quantmill.load(model, method)
    theirs: Any = quantmill.load(tmp_path / "x.gguf")
    name = "model.layers.1.mlp.down_proj"
    forms = [item.get_submodule(name).form.dequantize(torch.float32) for item in (ours, theirs)]
    assert torch.equal(*forms)


def test_a_matrix_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    def quantize(path: Path) -> None:
        quantmill.quantize(model, tmp_path / "out.gguf", "gguf-q4_0", imatrix=path)

    other = matrix(tmp_path / "other.gguf", ["blk.7.attn_q.weight"])
    refused(lambda: quantize(other), "none of its 1 entries is of this model")
    wide = matrix(tmp_path / "wide.gguf", width=128)
    refused(lambda: quantize(wide), "has 128 values, the weight 64 columns")
    (tmp_path / "text.dat").write_text("no importance matrix at all")
    refused(lambda: quantize(tmp_path / "text.dat"), "no importance matrix")
    refused(lambda: quantize(tmp_path / "none.gguf"), "can't be opened")
    assert not (tmp_path / "out.gguf").exists()


def test_what_it_lacks_is_told(model: Path, tmp_path: Path) -> None:
    path = matrix(tmp_path / "some.gguf", NAMES[:5])
    plan = quantmill.plan(model, "gguf-q4_0", imatrix=path)
    (finding,) = plan.findings
    assert finding.code == "QM-GGUF-035" and "lacks 9 of" in finding.cause
    # Codes of 8 bits are not chosen by weight: there is nothing to tell.
    assert not quantmill.plan(model, "gguf-q8_0", imatrix=path).findings
    # llama-quantize refuses this mix without one.
    (finding,) = quantmill.plan(model, "gguf-q2_k_s").findings
    assert finding.code == "QM-GGUF-036"


def test_methods_without_one_refuse_it(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    with pytest.raises(QuantmillError, match="imatrix"):
        quantmill.plan(model, "bnb-nf4", imatrix=matrix(tmp_path / "x.gguf"))
