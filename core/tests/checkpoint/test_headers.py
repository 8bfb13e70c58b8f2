"""The header of a safetensors file is checked in full before anything of it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from quantmill.checkpoint.dtypes import BITS, bytes_of, code_of, torch_dtype
from quantmill.checkpoint.headers import (
    MAX_HEADER_BYTES,
    CheckpointHeaders,
    TensorHeader,
    read_safetensors_header,
)
from quantmill.findings import QuantmillError

Pack = Callable[..., bytes]


def read(data: bytes, size: int | None = None) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Read a header from memory; no byte outside the file and none twice may be asked for."""
    size = len(data) if size is None else size
    asked = 0

    def ranges(start: int, stop: int) -> bytes:
        nonlocal asked
        assert 0 <= start <= stop <= size
        asked += stop - start
        assert asked <= size
        return data[start:stop]

    return read_safetensors_header(ranges, size, "some.safetensors")


def refused(data: bytes, size: int | None = None) -> str:
    """The one code for a wrong file, whose finding must say where, why and what to do."""
    with pytest.raises(QuantmillError) as caught:
        read(data, size)
    (finding,) = caught.value.findings
    assert finding.where == "some.safetensors" and finding.cause and finding.fix
    assert len(finding.cause) < 1000
    return finding.code


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    offsets = list(offsets) if isinstance(offsets, tuple) else offsets
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_valid_file() -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 7, dtype=torch.int64),
        "scalar": torch.tensor(3, dtype=torch.uint8),
    }
    data = save(tensors, metadata={"format": "pt", "who": "é"})
    found, metadata = read(data)
    assert metadata == {"format": "pt", "who": "é"}
    assert set(found) == set(tensors)
    starts = [item.start for item in found.values()]
    assert starts == sorted(starts)
    for name, tensor in tensors.items():
        item = found[name]
        assert item.name == name and item.file == "some.safetensors"
        assert item.dtype == code_of(tensor.dtype) and item.shape == tuple(tensor.shape)
        assert item.numel == tensor.numel()
        assert item.nbytes == tensor.numel() * tensor.element_size()
        raw = tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []
        assert data[item.start : item.stop] == bytes(raw)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype(pack: Pack, dtype: str) -> None:
    count = bytes_of(dtype, (3, 8))
    assert count == 24 * BITS[dtype] // 8
    found, _ = read(pack({"t": entry(dtype, (3, 8), (0, count))}, bytes(count)))
    assert found["t"].nbytes == count
    if not dtype.startswith("F6"):
        assert code_of(torch_dtype(dtype)) == dtype


def test_a_dtype_that_pytorch_lacks() -> None:
    with pytest.raises(QuantmillError) as caught:
        torch_dtype("F6_E2M3", "some.weight")
    assert caught.value.findings[0].code == "QM-CKPT-033"
    assert caught.value.findings[0].where == "some.weight"
    with pytest.raises(ValueError, match="complex128"):
        code_of(torch.complex128)


def test_a_file_without_tensors_and_a_padded_header(pack: Pack) -> None:
    assert read(pack(b"{}")) == ({}, {})
    assert read(pack(b'{"__metadata__":{}}' + b" " * 5)) == ({}, {})


def test_totals_of_a_checkpoint(pack: Pack) -> None:
    found, metadata = read(pack({"a": entry(), "b": entry("F16", (1, 3), (4, 10))}, bytes(10)))
    headers = CheckpointHeaders(found, metadata, {"some.safetensors": 10}, {}, None, None)  # type: ignore[arg-type]
    assert headers.total_bytes == 10 and len(headers.findings) == 0


@pytest.mark.parametrize("length", [0, 1, 3, 7])
def test_a_file_shorter_than_the_length_of_its_header(length: int) -> None:
    assert refused(bytes(length)) == "QM-CKPT-020"


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length(pack: Pack, length: int) -> None:
    assert refused(pack(b"{}", length=length)) == "QM-CKPT-021"


@pytest.mark.parametrize("length", [3, 100, MAX_HEADER_BYTES])
def test_a_header_longer_than_the_file(pack: Pack, length: int) -> None:
    assert refused(pack(b"{}", length=length)) == "QM-CKPT-020"


def test_a_source_that_gives_less_than_its_size(pack: Pack) -> None:
    data = pack({"t": entry()}, bytes(4))
    assert refused(data[:-20], size=len(data)) == "QM-CKPT-020"
    assert refused(data[:4], size=len(data)) == "QM-CKPT-020"


@pytest.mark.parametrize(
    "header",
    [
        b"{]",
        b"[]",
        b"  {}",
        b"{} {}",
        b'{"a":',
        b'{"\xff": 1}',
        b"\x80\x02}q\x00.",
        b"{" + b'"a":[' * 1000 + b"]" * 1000 + b"}",
        b"{" + b'"a":{' * 200_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_header_that_is_not_json(pack: Pack, header: bytes) -> None:
    assert refused(pack(header)) in ("QM-CKPT-022", "QM-CKPT-024")


def test_a_tensor_named_twice(pack: Pack) -> None:
    one = json.dumps(entry())
    assert refused(pack(f'{{"t":{one},"t":{one}}}'.encode(), bytes(4))) == "QM-CKPT-023"
    twice = b'{"t":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'
    assert refused(pack(twice, bytes(4))) == "QM-CKPT-023"


DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "raw",
    [
        None,
        7,
        "U8",
        [],
        {},
        DEEP,
        {"dtype": "U8", "shape": [4]},
        {**entry(), "more": 1},
        {"Dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        {"x" * 10_000: ["y" * 10_000] * 100},
    ],
)
def test_a_malformed_entry(pack: Pack, raw: Any) -> None:
    assert refused(pack({"t": raw}, bytes(4))) == "QM-CKPT-024"


def test_a_name_that_is_not_text(pack: Pack) -> None:
    raw = json.dumps(entry())
    assert refused(pack(f'{{"\\ud800":{raw}}}'.encode(), bytes(4))) == "QM-CKPT-024"
    found, _ = read(pack(f'{{"\\ud83d\\ude00 é":{raw}}}'.encode(), bytes(4)))
    assert list(found) == ["\U0001f600 é"]


@pytest.mark.parametrize("dtype", ["u8", "F33", "", 8, None, ["U8"], {"a": 1}, "X" * 10_000])
def test_an_unknown_dtype(pack: Pack, dtype: Any) -> None:
    assert refused(pack({"t": entry(dtype)}, bytes(4))) == "QM-CKPT-025"


@pytest.mark.parametrize(
    "shape",
    [
        None,
        4,
        "4",
        {"0": 4},
        [4.0],
        [True],
        ["4"],
        [None],
        [-4],
        [-1, -4],
        [2**63],
        [10**4000],
        [2**32, 2**32],
        [2**62, 0, 4],
        [1] * 65,
        [[4]],
        DEEP,
    ],
)
def test_an_impossible_shape(pack: Pack, shape: Any) -> None:
    assert refused(pack({"t": entry(shape=shape)}, bytes(4))) == "QM-CKPT-026"


@pytest.mark.parametrize(
    "offsets",
    [
        None,
        4,
        [],
        [0],
        [0, 4, 8],
        [0.0, 4.0],
        [False, 4],
        ["0", "4"],
        [-4, 0],
        [4, 0],
        [0, 2**63],
        [0, 3],
        [0, 5],
        [1, 5],
    ],
)
def test_offsets_that_contradict_the_rest(pack: Pack, offsets: Any) -> None:
    assert refused(pack({"t": entry(offsets=offsets)}, bytes(8))) == "QM-CKPT-027"


def test_bits_that_fill_no_byte(pack: Pack) -> None:
    assert bytes_of("F4", (3,)) is None
    assert refused(pack({"t": entry("F4", (3,), (0, 2))}, bytes(2))) == "QM-CKPT-027"


@pytest.mark.parametrize(
    ("second", "size"),
    [((2, 6), 6), ((0, 4), 4), ((5, 9), 9), ((4, 8), 9), ((4, 8), 100)],
    ids=["overlap", "same place", "hole", "a byte too many", "many too many"],
)
def test_tensors_that_do_not_fill_the_file(pack: Pack, second: tuple[int, int], size: int) -> None:
    header = {"a": entry(), "b": entry(offsets=second)}
    assert refused(pack(header, bytes(size))) == "QM-CKPT-027"


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_data_that_is_cut_off(pack: Pack, kept: int) -> None:
    assert refused(pack({"t": entry()}, bytes(kept))) == "QM-CKPT-020"
    assert refused(pack({"t": entry("F64", (2**40,), (0, 2**43))}, bytes(kept))) == "QM-CKPT-020"


@pytest.mark.parametrize(
    "metadata", [1, "pt", [], {"a": 1}, {"a": None}, {"a": {}}, {"a": "\ud800"}]
)
def test_metadata_that_is_no_table_of_text(pack: Pack, metadata: Any) -> None:
    assert refused(pack({"__metadata__": metadata})) == "QM-CKPT-028"


# -- arbitrary input ---------------------------------------------------------------------------

VALID = save(
    {
        "model.embed.weight": torch.arange(12, dtype=torch.int16).reshape(3, 4),
        "b": torch.ones(3, dtype=torch.float32),
        "é": torch.zeros(2, 0),
        "s": torch.tensor(True),
    },
    metadata={"format": "pt"},
)


def survives(data: bytes) -> None:
    """Refuse with a finding, or accept what safetensors itself accepts, and mean the same."""
    try:
        found, _ = read(data)
    except QuantmillError:
        return  # Anything else fails the test.
    position = int.from_bytes(data[:8], "little") + 8
    for item in found.values():
        assert item.start == position and item.stop == position + item.nbytes
        position = item.stop
    assert position == len(data)
    if b"-0" in data:  # JSON's minus zero is an integer to us and a float to safetensors.
        return
    theirs = dict(safetensors.deserialize(data))
    assert {name: tuple(item["shape"]) for name, item in theirs.items()} == {
        name: item.shape for name, item in found.items()
    }


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    survives(data)


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_any_bytes_as_a_header(header: bytes, data: bytes) -> None:
    survives(len(header).to_bytes(8, "little") + header + data)


CHANGES = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 2), st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400)
@given(CHANGES, st.booleans())
def test_a_valid_file_with_changes(changes: list[tuple[int, int, bytes]], fit: bool) -> None:
    data = bytearray(VALID)
    for place, removed, added in changes:
        data[place : place + removed] = added
    if fit:  # Let the stated length follow, so that more than the length is put to the test.
        length = int.from_bytes(VALID[:8], "little") + len(data) - len(VALID)
        data[:8] = max(length, 0).to_bytes(8, "little")
    survives(bytes(data))


INTEGERS = st.integers(-2, 12) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
JUNK = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(BITS)) | JUNK,
        "shape": st.lists(INTEGERS, max_size=3) | JUNK,
        "data_offsets": st.tuples(INTEGERS, INTEGERS).map(list) | JUNK,
    }
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3),
        ENTRIES | JUNK,
        max_size=4,
    ),
    st.integers(0, 24),
)
def test_any_table_as_a_header(header: dict[str, Any], size: int) -> None:
    raw = json.dumps(header).encode()
    survives(len(raw).to_bytes(8, "little") + raw + bytes(size))
