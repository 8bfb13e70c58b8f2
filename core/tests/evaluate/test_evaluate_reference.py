"""The reference file: storage error, completeness, corruption, cache."""

from __future__ import annotations

import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantmill.evaluate import (
    PROTOCOLS,
    ReferenceCache,
    ReferenceLogits,
    ReferenceSpec,
    ReferenceWriter,
    Storage,
    cache_folder,
    cached_reference,
)
from quantmill.evaluate.storage import (
    FLOAT32_LIMIT,
    buffer_of,
    choose_encoding,
    decode,
    encode,
    largest_error,
)
from quantmill.findings import Findings, QuantmillError

TOKENS = torch.arange(23, dtype=torch.int64) % 11
VOCAB = 11


def toy_model(ids: Tensor) -> Tensor:
    """Logits [B, T, 11] that depend on the token and its position."""
    position = torch.arange(ids.shape[1])
    columns = torch.arange(VOCAB)
    return torch.sin(ids[..., None] * 1.7 + columns * 0.9 + position[:, None] * 0.3) * 3


def written(folder: Path, storage: Storage = "auto") -> ReferenceLogits:
    spec = ReferenceSpec.of("toy", TOKENS, context=6, storage=storage)
    return cached_reference(spec, TOKENS, lambda: toy_model, cache=ReferenceCache(folder))


def code_of(error: pytest.ExceptionInfo[QuantmillError]) -> str:
    return error.value.findings[0].code


@pytest.mark.parametrize("storage", ["float32", "cubic16"])
def test_round_trip(tmp_path: Path, storage: Storage) -> None:
    reference = written(tmp_path, storage)
    assert (reference.windows, reference.rows, reference.vocab) == (3, 15, VOCAB)
    assert reference.encoding == storage
    assert reference.path.stat().st_size == reference.nbytes
    again = ReferenceLogits.open(reference.path)
    assert again.spec == reference.spec
    for window in range(3):
        ids = TOKENS[None, window * 6 : window * 6 + 6]
        expected = torch.log_softmax(toy_model(ids)[0, :-1], -1)
        got = again.log_probs(window)
        assert got.dtype == torch.float32
        if storage == "float32":
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
        assert torch.equal(again.log_probs(window, 2, 4), got[2:4])
    assert again.log_probs(0, 1, 1).shape == (0, VOCAB)
    for bad in [(3, 0, 1), (-1, 0, 1), (0, 0, 6), (0, 2, 1)]:
        with pytest.raises(IndexError):
            again.log_probs(*bad)


@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("vocab", [50, 32_000])
def test_error_of_cubic16(spread: float, vocab: int) -> None:
    torch.manual_seed(1)
    rows = 32
    p = torch.log_softmax((torch.randn(rows, vocab) * spread).double(), -1)
    q = torch.log_softmax(p + 0.2 * torch.randn(rows, vocab).double(), -1)
    stored = decode(encode(p.float(), "cubic16"), "cubic16").double()
    relative = (p - p.amax(1, keepdim=True)).exp()
    likely = relative > 1e-3
    bound = relative[likely].apply_(largest_error)
    assert bool(((stored - p)[likely].abs() <= 2 * bound + 2e-6).all())

    def kl(a: Tensor, b: Tensor) -> float:
        terms = torch.where(a > -math.inf, a.exp() * (a - b), 0.0)
        return float(terms.sum(1).mean())

    assert abs(kl(stored, q) - kl(p, q)) < 1e-6
    assert abs(kl(stored, p)) < 1e-7
    assert float(stored.exp().sum(1).sub(1).abs().max()) < 1e-5


def test_auto_storage_depends_on_size() -> None:
    assert choose_encoding("auto", FLOAT32_LIMIT // 400, 100) == "float32"
    assert choose_encoding("auto", FLOAT32_LIMIT // 400 + 1, 100) == "cubic16"
    assert choose_encoding("float32", 10**9, 10**5) == "float32"


def test_key_depends_on_every_field() -> None:
    spec = ReferenceSpec.of("toy", TOKENS, protocol="llama.cpp", context=6, bos_id=1)
    others = [
        replace(spec, model="other"),
        replace(spec, protocol="blocks"),
        replace(spec, context=7),
        replace(spec, max_windows=2),
        replace(spec, bos_id=2),
        replace(spec, storage="cubic16"),
        ReferenceSpec.of("toy", TOKENS + 1, protocol="llama.cpp", context=6, bos_id=1),
    ]
    assert len({item.key for item in [spec, *others]}) == 8
    assert ReferenceSpec.of("toy", TOKENS[::1].clone(), context=6, bos_id=1).bos_id is None
    strange = replace(PROTOCOLS["blocks"], min_context=4)
    with pytest.raises(QuantmillError) as caught:
        ReferenceSpec.of("toy", TOKENS, protocol=strange, context=6)
    assert code_of(caught) == "QM-EVAL-001"


def test_the_model_is_loaded_only_on_a_miss(tmp_path: Path) -> None:
    written(tmp_path)
    spec = ReferenceSpec.of("toy", TOKENS, context=6)
    cache = ReferenceCache(tmp_path)
    findings = Findings()
    assert cache.find(spec, findings) is not None
    cached_reference(spec, TOKENS, lambda: pytest.fail("loaded"), cache=cache)
    assert cache.find(replace(spec, model="other"), findings) is None
    assert len(findings) == 0
    assert [item.name for item in cache.folder.iterdir()] == [f"{spec.key}.qmref"]


def test_the_model_is_gone_when_the_reference_is_there(tmp_path: Path) -> None:
    class Model:
        def __call__(self, ids: Tensor) -> Tensor:
            return toy_model(ids)

    alive: list[weakref.ref[Model]] = []

    def load() -> Model:
        model = Model()
        alive.append(weakref.ref(model))
        return model

    spec = ReferenceSpec.of("toy", TOKENS, context=6)
    cached_reference(spec, TOKENS, load, cache=ReferenceCache(tmp_path))
    assert len(alive) == 1 and alive[0]() is None


def corrupt(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "empty":
        data.clear()
    elif how == "truncated":
        del data[-5:]
    elif how == "longer":
        data += b"\0"
    elif how == "magic":
        data[0] ^= 1
    elif how == "header":
        data[30] ^= 1
    elif how == "values":
        data[4096 + 100] ^= 1
    elif how == "checksum":
        data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["empty", "truncated", "longer", "magic", "header", "values", "checksum"]
)
def test_corrupt_entries_are_reported_and_rebuilt(tmp_path: Path, how: str) -> None:
    reference = written(tmp_path)
    good = reference.path.read_bytes()
    corrupt(reference.path, how)
    with pytest.raises(QuantmillError) as caught:
        ReferenceLogits.open(reference.path)
    assert code_of(caught) == "QM-EVAL-014"
    findings = Findings()
    cache = ReferenceCache(tmp_path)
    again = cached_reference(
        reference.spec, TOKENS, lambda: toy_model, cache=cache, findings=findings
    )
    assert [item.code for item in findings.warnings] == ["QM-EVAL-010"]
    assert again.path.read_bytes() == good


def test_an_entry_under_a_wrong_name_is_ignored(tmp_path: Path) -> None:
    reference = written(tmp_path)
    cache = ReferenceCache(tmp_path)
    other = replace(reference.spec, model="other")
    reference.path.rename(cache.path(other))
    findings = Findings()
    assert cache.find(other, findings) is None
    assert [item.code for item in findings] == ["QM-EVAL-010"]


def test_a_vanished_file_is_an_error(tmp_path: Path) -> None:
    reference = written(tmp_path)
    reference.path.unlink()
    with pytest.raises(QuantmillError) as caught:
        reference.log_probs(0)
    assert code_of(caught) == "QM-EVAL-014"


def test_a_failing_model_leaves_nothing(tmp_path: Path) -> None:
    def failing(ids: Tensor) -> Tensor:
        if int(ids[0, 0]) != int(TOKENS[0]):
            raise RuntimeError("out of memory")
        return toy_model(ids)

    spec = ReferenceSpec.of("toy", TOKENS, context=6)
    cache = ReferenceCache(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached_reference(spec, TOKENS, lambda: failing, cache=cache)
    assert list(cache.folder.iterdir()) == []


def test_writer_counts_rows(tmp_path: Path) -> None:
    spec = ReferenceSpec.of("toy", TOKENS, context=6)
    rows = torch.log_softmax(torch.zeros(5, VOCAB), -1)

    def refused(writer: ReferenceWriter, *parts: Tensor) -> str:
        with pytest.raises(QuantmillError) as caught, writer:  # noqa: PT012 either may raise
            for part in parts:
                writer.add(part)
        return code_of(caught)

    cache = ReferenceCache(tmp_path)
    assert refused(cache.writer(spec)) == "QM-EVAL-012"
    assert refused(cache.writer(spec), rows, rows[:2]) == "QM-EVAL-012"
    assert refused(cache.writer(spec), rows[:3], rows[:3]) == "QM-EVAL-012"
    assert refused(cache.writer(spec), rows, rows[:, 1:]) == "QM-EVAL-012"
    assert refused(cache.writer(spec), rows, rows, rows, rows) == "QM-EVAL-012"
    writer = cache.writer(spec)
    writer.abort()
    assert refused(writer, rows) == "QM-EVAL-012"
    assert not cache.folder.exists() or list(cache.folder.iterdir()) == []


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    spec = ReferenceSpec.of("toy", TOKENS, context=6)
    with pytest.raises(QuantmillError) as caught, ReferenceCache(blocked).writer(spec) as writer:
        writer.add(torch.log_softmax(torch.zeros(5, VOCAB), -1))
    assert code_of(caught) == "QM-EVAL-013"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTMILL_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    assert ReferenceCache().folder == tmp_path / "reference-logits"
    monkeypatch.delenv("QUANTMILL_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quantmill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "quantmill"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "quantmill"


def test_buffer_of() -> None:
    assert bytes(buffer_of(torch.tensor([1, 256], dtype=torch.int16))) == b"\x01\0\0\x01"
    assert bytes(buffer_of(torch.empty(0))) == b""
    with pytest.raises(ValueError, match="contiguous"):
        buffer_of(torch.zeros(3, 2).T)
