"""Files: round trips, splits, byte orders, and everything that can be wrong with one."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmill.findings import QuantmillError
from quantmill_gguf import fuzz
from quantmill_gguf.container import Array, GgufFile, open_split, parse
from quantmill_gguf.reader import headers_of, read
from quantmill_gguf.testing import KINDS, METADATA, entry, header, matrices, padded, text, write
from quantmill_gguf.types import TYPES
from quantmill_gguf.writer import GgufWriter, TensorSpec

DATA = Path(__file__).parent / "data"
PATH = Path("test.gguf")


def code_of(data: bytes) -> str:
    with pytest.raises(QuantmillError) as caught:
        parse(data, PATH)
    (finding,) = caught.value.findings
    assert finding.cause and finding.fix
    return finding.code


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, Array) else value


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64, 8])
def test_what_is_written_is_read(tmp_path: Path, big: bool, version: int, alignment: int) -> None:
    tensors = matrices()
    path = write(tmp_path / "x.gguf", tensors, big_endian=big, version=version, alignment=alignment)
    file = GgufFile.open(path)
    assert (file.version, file.big_endian, file.alignment) == (version, big, alignment)
    for key, value in METADATA.items():
        assert plain(file.metadata[key]) == value, key
    assert [item.name for item in file.tensors.values()] == list(tensors)
    headers = read(path)
    assert not list(tmp_path.glob(".*")), "a temporary file was left"
    with headers.source.reader(headers) as reader:  # type: ignore[attr-defined]
        for name, (kind, raw) in tensors.items():
            shown = name if TYPES[kind].info.plain else f"{name}.{kind}"
            for tensor in (reader.tensor(shown), reader.mapped(shown)):
                assert torch.equal(tensor.contiguous().view(torch.uint8), raw), kind
            rows = [block.clone() for _, block in reader.row_blocks(shown, 2)]
            assert torch.equal(torch.cat(rows).view(torch.uint8), raw), kind
            part = torch.empty(2, dtype=reader.tensor(shown).dtype)
            reader.read_into(headers.tensors[shown], part, 3)
            flat = reader.tensor(shown).reshape(-1)[3:5]
            assert torch.equal(part.view(torch.uint8), flat.view(torch.uint8)), kind


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tensors = {k: v for k, v in matrices().items() if v[0] not in ("Q1_0", "Q2_0")}
    found = gguf.GGUFReader(write(tmp_path / "x.gguf", tensors))
    assert found.fields["general.name"].contents() == METADATA["general.name"]
    assert found.fields["a.texts"].contents() == METADATA["a.texts"]
    for item in found.tensors:
        kind, raw = tensors[item.name]
        assert item.tensor_type.name == kind
        assert item.data.tobytes() == raw.numpy().tobytes()


def test_metadata_is_written_as_it_was_read(tmp_path: Path) -> None:
    file = GgufFile.open(DATA / "tiny-Q4_K_M.gguf")
    specs = [TensorSpec(t.name, t.type.name, t.shape) for t in file.tensors.values()]
    with GgufWriter(tmp_path / "y.gguf", file.metadata, specs, kinds=file.kinds) as writer:
        for tensor in file.tensors.values():
            raw = bytearray(file.data[tensor.start : tensor.stop])
            writer.write(torch.frombuffer(raw, dtype=torch.uint8))
    assert (tmp_path / "y.gguf").read_bytes() == (DATA / "tiny-Q4_K_M.gguf").read_bytes()


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    spec = TensorSpec("t", "F32", (4,))
    with pytest.raises(ValueError, match="not written"), GgufWriter(tmp_path / "x", {}, [spec]):
        pass
    with (
        pytest.raises(ValueError, match="more bytes"),
        GgufWriter(tmp_path / "x", {}, [spec]) as writer,
    ):
        writer.write(torch.zeros(20, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())
    (tmp_path / "no").touch()
    with pytest.raises(QuantmillError), GgufWriter(tmp_path / "no" / "x", {}, []):
        pass


def split(folder: Path, change: dict[int, dict[str, Any]] | None = None) -> list[Path]:
    items = list(matrices().items())
    paths = []
    for index in range(3):
        part = dict(items[index::3])
        metadata = {"split.no": index, "split.count": 3, "split.tensors.count": len(items)}
        metadata.update((change or {}).get(index, {}))
        path = folder / f"model-{index + 1:05}-of-00003.gguf"
        paths.append(write(path, part, metadata={**METADATA, **metadata}))
    return paths


def test_a_split_is_one_checkpoint(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:
        headers = read(path)
        assert len(headers.tensors) == len(TYPES) and len(headers.files) == 3
    assert headers.source.names() == [path.name for path in paths]


@pytest.mark.parametrize(
    "change", [{1: {"split.no": 2}}, {1: {"split.count": 4}}, {0: {"split.tensors.count": 1}}]
)
def test_files_that_are_no_split_are_refused(tmp_path: Path, change: Any) -> None:
    first = split(tmp_path, change)[0]
    with pytest.raises(QuantmillError, match="QM-GGUF-013"):
        open_split(first)


def test_a_split_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[2].unlink()
    with pytest.raises(QuantmillError, match="00003-of-00003"):
        open_split(paths[0])
    with pytest.raises(QuantmillError, match="QM-GGUF-013"):
        open_split(paths[0].rename(tmp_path / "other.gguf"))


def key(name: bytes, kind: int, rest: bytes) -> bytes:
    return header(keys=1) + text(name) + struct.pack("<I", kind) + rest


BAD = {
    "empty": (b"", "001"),
    "magic": (b"GGML" + bytes(60), "001"),
    "older magic": (b"ggjt" + bytes(60), "001"),
    "magic alone": (b"GGUF", "002"),
    "version 0": (header(version=0), "003"),
    "version 1": (header(version=1), "003"),
    "version 1, big-endian": (header(version=1, order=">"), "003"),
    "version 4": (header(version=4), "003"),
    "2**60 tensors": (header(tensors=2**60), "004"),
    "2**60 keys": (header(keys=2**60), "004"),
    "text past the end": (header(keys=1) + struct.pack("<QQ", 2**40, 0), "005"),
    "key not UTF-8": (key(b"\xff", 0, bytes(8)), "005"),
    "value past the end": (key(b"k", 8, struct.pack("<Q", 100)), "005"),
    "unknown value type": (key(b"k", 13, bytes(16)), "006"),
    "nested array": (key(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(16)), "006"),
    "array of unknown type": (key(b"k", 9, struct.pack("<IQ", 77, 1) + bytes(16)), "006"),
    "array of 2**60 texts": (key(b"k", 9, struct.pack("<IQ", 8, 2**60)), "004"),
    "array of 2**62 numbers": (key(b"k", 9, struct.pack("<IQ", 10, 2**62)), "004"),
    "text of an array": (key(b"k", 9, struct.pack("<IQQ", 8, 1, 50)), "005"),
    "key twice": (
        header(keys=2) + (text(b"key") + struct.pack("<II", 4, 1)) * 2 + bytes(32),
        "007",
    ),
    "alignment 0": (key(b"general.alignment", 4, struct.pack("<I", 0)), "012"),
    "alignment 24": (key(b"general.alignment", 4, struct.pack("<I", 24)), "012"),
    "alignment text": (key(b"general.alignment", 8, text(b"32")), "012"),
    "name twice": (padded(header(tensors=2) + entry() + entry(offset=128), 256), "007"),
    "dimensions": (padded(header(tensors=1) + entry(dims=(1,) * 5), 64), "008"),
    "product": (padded(header(tensors=1) + entry(dims=(2**32, 2**31)), 64), "008"),
    "product of zero": (padded(header(tensors=1) + entry(dims=(2**63, 2, 0)), 64), "008"),
    "blocks": (padded(header(tensors=1) + entry(dims=(33,), kind=2), 64), "008"),
    "type 4": (padded(header(tensors=1) + entry(kind=4), 256), "009"),
    "type 2**31": (padded(header(tensors=1) + entry(kind=2**31), 256), "009"),
    "unaligned": (padded(header(tensors=1) + entry(offset=8), 256), "010"),
    "past the end": (padded(header(tensors=1) + entry(offset=256), 256), "002"),
    "far past the end": (padded(header(tensors=1) + entry(offset=2**64 - 32), 256), "002"),
    "overlap": (
        padded(header(tensors=2) + entry() + entry(name=b"u", offset=64), 256),
        "011",
    ),
    "cut data": (padded(header(tensors=1) + entry(), 127), "002"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_named(name: str) -> None:
    data, number = BAD[name]
    assert code_of(data) == f"QM-GGUF-{number}"


def sections(path: Path) -> list[int]:
    """Where a file's parts end: magic, version, counts, tensor data, and all between."""
    file = GgufFile.open(path)
    ends = [4, 8, 16, 24]
    for tensor in file.tensors.values():
        ends += [tensor.start, tensor.stop]
    first = min(tensor.start for tensor in file.tensors.values())
    return sorted({*ends, *range(0, first, 7)})


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", matrices())
    data = path.read_bytes()
    last = max(item.stop for item in GgufFile.open(path).tensors.values())
    for end in sections(path):
        for position in (end - 1, end, end + 1):
            if 0 <= position < last:
                with pytest.raises(QuantmillError):
                    parse(data[:position], PATH)


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 4), (2, 2, 2, 2), (0, 4)])
def test_tensors_of_any_rank_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    spec = TensorSpec("t.weight", "F32", shape)
    with GgufWriter(tmp_path / "x.gguf", {}, [spec], big_endian=True) as writer:
        writer.write(values.reshape(-1).view(torch.uint8))
    headers = read(tmp_path / "x.gguf")
    with headers.source.reader(headers) as reader:  # type: ignore[attr-defined]
        assert torch.equal(reader.tensor("t.weight"), values)
        if shape:
            rows = [block for _, block in reader.row_blocks("t.weight", 1)]
            assert torch.equal(torch.cat([torch.empty(0, *shape[1:]), *rows]), values)


def test_no_damage_escapes_the_checks() -> None:
    """``python -m quantmill_gguf.fuzz`` does the same as often as it is told to."""
    for data, _ in fuzz.seeds():
        assert fuzz.execute(bytearray(data), deep=True) == "read"
    tracemalloc.start()
    seen = fuzz.run(2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen["read"] > 50 and len(seen) > 8
    assert peak < 64 << 20


CROWDED = {
    "tensors": (
        header(tensors=40_000) + (text(b"") + struct.pack("<IIQ", 0, 0, 0)) * 40_000,
        "up to",
    ),
    "keys": (header(keys=40_000) + (text(b"k") + struct.pack("<IB", 0, 1)) * 40_000, "up to"),
    "a name": (header(keys=1) + text(b"k" * 70_000) + struct.pack("<IB", 0, 1), "65535 bytes"),
    "texts": (key(b"k", 8, text(b"t" * (17 << 20))), "16777216 bytes"),
}


@pytest.mark.parametrize("name", CROWDED)
def test_what_takes_more_memory_than_its_file_is_refused(name: str) -> None:
    data, cause = CROWDED[name]
    tracemalloc.start()
    with pytest.raises(QuantmillError, match=cause):
        parse(data, PATH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(data) + (64 << 20)


def test_long_arrays_are_not_decoded_to_be_shown() -> None:
    rest = struct.pack("<IQ", 8, 4) + text(b"t" * (4 << 20)) * 4
    file = parse(key(b"a.texts", 9, rest), PATH)
    assert headers_of([file], PATH).metadata["a.texts"] == "[4 values]"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_of_a_rotary_embedding_are_positive(tmp_path: Path, value: float) -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "tokenizer.ggml.tokens": ["a"],
    }
    raw = torch.full((1, 16), value).view(torch.uint8)
    path = write(tmp_path / "x.gguf", {"rope_freqs.weight": ("F32", raw)}, metadata=metadata)
    with pytest.raises(QuantmillError, match="QM-GGUF-023"):
        read(path)


def test_every_kind_of_value_has_a_name_to_be_written_by() -> None:
    assert set(KINDS) <= set(METADATA)
