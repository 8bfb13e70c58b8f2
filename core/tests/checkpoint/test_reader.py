"""The reader gives the very bytes of a file, whole, mapped or by rows, from several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantmill.checkpoint.dtypes import BITS, bytes_of, torch_dtype, torch_shape
from quantmill.checkpoint.reader import TensorReader
from quantmill.checkpoint.source import open_source, read_headers
from quantmill.findings import QuantmillError
from quantmill.testing.memory import resident

Pack = Callable[..., bytes]
DTYPES = [code for code in BITS if not code.startswith("F6")]
SHAPES = [(8,), (1, 2), (3, 4), (7, 6), (5, 2, 4), (2, 3, 2, 2), (129, 34)]


def reader_of(path: Path, **options: int) -> TensorReader:
    return TensorReader(read_headers(open_source(path)), **options)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def code(caught: pytest.ExceptionInfo[QuantmillError]) -> str:
    (finding,) = caught.value.findings
    assert finding.cause and finding.fix
    return finding.code


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory, pack: Pack
) -> Iterator[tuple[TensorReader, dict[str, bytes]]]:
    """A file with every dtype in every shape, in an order that leaves most of them unaligned."""
    path = tmp_path_factory.mktemp("all") / "all.safetensors"
    header, data, expected = {}, b"", {}
    for place, (dtype, shape) in enumerate((d, s) for s in SHAPES for d in DTYPES):
        count = bytes_of(dtype, shape)
        assert count is not None
        block = os.urandom(count) if dtype != "BOOL" else bytes(n % 2 for n in range(count))
        name = f"{dtype}.{'x'.join(map(str, shape))}.{place}"
        offsets = [len(data), len(data) + count]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += block
        expected[name] = block
    path.write_bytes(pack(header, data))
    with reader_of(path, buffer_bytes=64) as reader:
        yield reader, expected


def test_a_whole_tensor(everything: tuple[TensorReader, dict[str, bytes]]) -> None:
    reader, expected = everything
    for name, block in expected.items():
        header, tensor = reader.headers.tensors[name], reader.tensor(name)
        assert tensor.dtype == torch_dtype(header.dtype)
        assert tuple(tensor.shape) == torch_shape(header.dtype, header.shape)
        assert raw(tensor) == block


def test_a_mapped_tensor(everything: tuple[TensorReader, dict[str, bytes]]) -> None:
    reader, expected = everything
    aligned = 0
    for name, block in expected.items():
        tensor, whole = reader.mapped(name), reader.tensor(name)
        assert tensor.dtype == whole.dtype and tensor.shape == whole.shape
        assert raw(tensor) == block
        assert tensor.data_ptr() % tensor.element_size() == 0
        aligned += reader.headers.tensors[name].start % tensor.element_size() == 0
    assert 0 < aligned < len(expected)  # Both ways were taken.


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 1000])
def test_row_blocks(everything: tuple[TensorReader, dict[str, bytes]], rows: int) -> None:
    reader, expected = everything
    for name, block in expected.items():
        whole = reader.tensor(name)
        seen, position = b"", 0
        for start, part in reader.row_blocks(name, rows):
            assert start == position and part.dtype == whole.dtype
            assert 0 < part.shape[0] <= rows and part.shape[1:] == whole.shape[1:]
            seen += raw(part)
            position += part.shape[0]
        assert seen == block and position == whole.shape[0]


def test_part_of_a_tensor_into_memory_that_is_there(
    everything: tuple[TensorReader, dict[str, bytes]],
) -> None:
    reader, expected = everything
    name = next(name for name in expected if name.startswith("F32.7x6"))
    header = reader.headers.tensors[name]
    out = torch.empty(10)
    reader.read_into(header, out, 5)
    assert raw(out) == expected[name][20:60]
    as_bytes = torch.empty(7, dtype=torch.uint8)
    reader.read_into(header, as_bytes, 3)
    assert raw(as_bytes) == expected[name][3:10]
    for wrong, start in ((torch.empty(43), 0), (torch.empty(10), 33), (torch.empty(2), -1)):
        with pytest.raises(ValueError, match="that many"):
            reader.read_into(header, wrong, start)
    with pytest.raises(ValueError, match="contiguous"):
        reader.read_into(header, torch.empty(4, 4).T)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    rows=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)
def test_any_shape_and_any_number_of_rows(
    tmp_path: Path, shape: list[int], rows: int, dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape).mul(50).to(dtype)
    save_file({"pad": torch.ones(3, dtype=torch.uint8), "t": tensor}, tmp_path / "t.safetensors")
    with reader_of(tmp_path / "t.safetensors", buffer_bytes=16) as reader:
        assert torch.equal(reader.tensor("t"), tensor)
        assert torch.equal(reader.mapped("t"), tensor)
        blocks = [block.clone() for _, block in reader.row_blocks("t", rows)]
        assert len(blocks) == -(-shape[0] // rows)
        assert torch.equal(torch.cat(blocks) if blocks else tensor, tensor)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path / "model.safetensors"
    tensors = {
        f"t{n}": torch.arange(n, n + 40_000, dtype=torch.int32).reshape(400, 100) for n in range(6)
    }
    save_file({**tensors, "scalar": torch.tensor(2.5)}, path)
    return path, tensors


def test_scalars(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with reader_of(pair[0]) as reader:
        assert reader.tensor("scalar").item() == 2.5 == reader.mapped("scalar").item()
        assert reader.tensor("scalar").shape == ()
        with pytest.raises(ValueError, match="scalar"):
            next(reader.row_blocks("scalar", 1))


def test_a_name_that_is_not_there(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with reader_of(pair[0]) as reader:
        for call in (reader.tensor, reader.mapped, lambda name: next(reader.row_blocks(name, 1))):
            with pytest.raises(QuantmillError) as caught:
                call("skalar")
            assert code(caught) == "QM-CKPT-032" and "did you mean scalar" in str(caught.value)


def test_dtypes_and_packings_without_a_counterpart(tmp_path: Path, pack: Pack) -> None:
    path = tmp_path / "x.safetensors"
    header = {
        "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
        "odd": {"dtype": "F4", "shape": [2, 3], "data_offsets": [3, 6]},
    }
    path.write_bytes(pack(header, bytes(6)))
    with reader_of(path) as reader:
        for name in header:
            for call in (reader.tensor, reader.mapped, lambda n: next(reader.row_blocks(n, 1))):
                with pytest.raises(QuantmillError) as caught:
                    call(name)
                assert code(caught) == "QM-CKPT-033"


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(
    pair: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    before = pair[0].read_bytes()
    reader = reader_of(pair[0])
    mapped = reader.mapped("t1")
    mapped.add_(1)
    reader.close()
    assert torch.equal(mapped, pair[1]["t1"] + 1)  # Valid although the reader is closed.
    assert pair[0].read_bytes() == before


def test_pages_of_a_mapped_tensor_go_with_the_last_of_it(tmp_path: Path) -> None:
    values = {name: torch.randn(1 << 20) for name in ("a", "b")}
    save_file(values, tmp_path / "model.safetensors")
    reader = reader_of(tmp_path)
    kept = reader.mapped("b")
    before = resident("RssFile")

    def held() -> int:
        return resident("RssFile") - before

    one, other = reader.mapped("a"), reader.mapped("a")
    one[5000] = 7.0
    assert float(one.sum() + kept.sum()) and held() > 7 << 20
    del one
    # Written to, and in use: nothing of it may go.
    assert float(other[5000]) == 7.0 and torch.equal(other[:5000], values["a"][:5000])
    assert held() > 7 << 20
    del other
    assert held() < 6 << 20
    assert torch.equal(reader.mapped("a"), values["a"]) and torch.equal(kept, values["b"])


def test_a_closed_reader(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    reader = reader_of(pair[0])
    reader.tensor("t1")
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.tensor("t1")
    with pytest.raises(RuntimeError):
        next(reader.row_blocks("t1", 1))


def test_closing_gives_the_descriptors_back(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    def held() -> int:
        return sum(path.resolve() == real for path in Path("/proc/self/fd").iterdir())

    real = pair[0].resolve()
    with reader_of(pair[0]) as reader:
        list(reader.row_blocks("t1", 100))
        assert held() == 1
    assert held() == 0


@pytest.mark.parametrize("kept", ["header", "half a tensor"])
def test_a_file_that_is_cut_while_it_is_read(
    pair: tuple[Path, dict[str, torch.Tensor]], kept: str
) -> None:
    with reader_of(pair[0]) as reader:
        last = max(reader.headers.tensors.values(), key=lambda item: item.start)
        end = last.start + (200 * 400 + 7 if kept != "header" else 0)
        name = last.name
        if name == "scalar":
            pytest.fail("the scalar was not expected to be the last")
        blocks = reader.row_blocks(name, 50)
        next(blocks)
        os.truncate(pair[0], end)
        with pytest.raises(QuantmillError) as caught:
            list(blocks)
        assert code(caught) == "QM-CKPT-030" and name in str(caught.value)
        for call in (reader.tensor, reader.mapped):
            with pytest.raises(QuantmillError) as caught:
                call(name)
            assert code(caught) == "QM-CKPT-030"
        # The reader goes on with what is there.
        first = min(reader.headers.tensors.values(), key=lambda item: item.start)
        assert reader.tensor(first.name).numel() == first.numel


def test_a_file_that_is_emptied_or_removed(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with reader_of(pair[0]) as reader:
        os.truncate(pair[0], 0)
        with pytest.raises(QuantmillError) as caught:
            reader.mapped("t1")
        assert code(caught) == "QM-CKPT-031"
    with pytest.raises(QuantmillError) as caught:
        reader_of(pair[0])
    assert code(caught) == "QM-CKPT-020"


def test_a_file_that_cannot_be_opened(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    reader = reader_of(pair[0])
    pair[0].unlink()
    with reader, pytest.raises(QuantmillError) as caught:
        reader.tensor("t1")
    assert code(caught) == "QM-CKPT-031" and "model.safetensors" in str(caught.value)


def test_an_input_error_of_the_disk(
    pair: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(5, os.strerror(5))

    with reader_of(pair[0]) as reader:
        monkeypatch.setattr(os, "preadv", broken)
        for call in (reader.tensor, lambda name: next(reader.row_blocks(name, 9))):
            with pytest.raises(QuantmillError) as caught:
                call("t1")
            assert code(caught) == "QM-CKPT-031"


def test_reads_that_give_less_than_asked(
    pair: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:4097]], at))
    with reader_of(pair[0]) as reader:
        assert torch.equal(reader.tensor("t3"), pair[1]["t3"])


# -- several at a time -------------------------------------------------------------------------


def test_iterations_inside_each_other(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with reader_of(pair[0], buffer_bytes=16) as reader:
        for start, outer in reader.row_blocks("t1", 90):
            inner = torch.cat([block.clone() for _, block in reader.row_blocks("t2", 70)])
            assert torch.equal(inner, pair[1]["t2"])
            assert torch.equal(outer, pair[1]["t1"][start : start + 90])


def test_an_iteration_that_is_left_early(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with reader_of(pair[0]) as reader:
        for _ in range(50):
            for _, block in reader.row_blocks("t4", 1):
                assert torch.equal(block, pair[1]["t4"][:1])
                break
            whole = [block.clone() for _, block in reader.row_blocks("t5", 150)]
            assert torch.equal(torch.cat(whole), pair[1]["t5"])


def test_buffers_are_used_again(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with reader_of(pair[0]) as reader:
        places = set()
        for name in pair[1]:
            places |= {block.data_ptr() for _, block in reader.row_blocks(name, 100)}
        assert len(places) == 2


def test_several_threads(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    together = threading.Barrier(8)

    def work(reader: TensorReader, number: int) -> bool:
        together.wait()
        right = True
        for turn in range(15):
            name = f"t{(number + turn) % 6}"
            for start, block in reader.row_blocks(name, 37 + number):
                right &= torch.equal(block, pair[1][name][start : start + 37 + number])
            right &= torch.equal(reader.tensor(name), pair[1][name])
            right &= torch.equal(reader.mapped(name), pair[1][name])
        return right

    with reader_of(pair[0], buffer_bytes=1) as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: work(reader, number), range(8)))


def test_what_was_begun_is_what_comes(pair: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with reader_of(pair[0], buffer_bytes=1) as reader:

        def places(name: str, rows: int) -> set[int]:
            found, blocks = set(), []
            for _, block in reader.row_blocks(name, rows):
                found.add(block.data_ptr())
                blocks.append(block.clone())
            assert torch.equal(torch.cat(blocks), pair[1][name])
            return found

        first = places("t0", 90)
        for name, rows in (("t1", 90), ("t1", 64), ("t2", 90)):
            reader.begin("t1", 90)
            reader.begin("t2", 90)  # one at a time
            assert places(name, rows) <= first
        reader.begin("t0", 90)
        assert torch.equal(reader.tensor("t3"), pair[1]["t3"])
        assert places("t0", 90) == first
        reader.begin("t0", 90)


def test_what_can_not_be_begun_is_told_when_it_is_asked_for(
    pair: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    with reader_of(pair[0]) as reader:
        next(reader.row_blocks("t1", 1))
        os.truncate(pair[0], 1000)
        reader.begin("t1", 50)
        with pytest.raises(QuantmillError) as caught:
            list(reader.row_blocks("t1", 50))
        assert code(caught) == "QM-CKPT-030"
