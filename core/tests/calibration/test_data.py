"""Calibration data: what is read, and what is refused, by whom it names and how it is mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantmill.calibration.data import read_calibration
from quantmill.findings import QuantmillError


class _Tokenizer:
    """A token per letter that is no space."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 97 for letter in text if letter != " "]}

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        return "".join(message["content"] for message in messages)


def _read(data: Any, length: int = 4, **options: Any) -> list[list[int]]:
    arguments: Any = {"samples": 8, "seed": 0, "vocabulary": 26, **options}
    rows: list[list[int]] = read_calibration(
        data, _Tokenizer, length=length, **arguments
    ).tokens.tolist()
    return rows


def test_every_kind_of_source_gives_the_same_windows(tmp_path: Path) -> None:
    wanted = [[0, 1, 2, 3], [4, 5, 6, 7]]
    (tmp_path / "a.txt").write_text("abcd efghi")
    lines: list[Any] = [
        {"text": "abc"},
        {"messages": [{"role": "user", "content": "de"}]},
        "",
        {"input_ids": [5, 6, 7, 8]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(lines))
    ids = torch.arange(9)
    save_file({"input_ids": ids, "attention_mask": ids.clone()}, tmp_path / "a.safetensors")
    save_file({"whatever": ids.to(torch.int32)}, tmp_path / "b.safetensors")
    sources = [tmp_path / name for name in ("a.txt", "a.jsonl", "a.json", "a.safetensors")]
    sources += [tmp_path / "b.safetensors"]
    for source in (*sources, str(sources[0]), ids, ids[:8].reshape(2, 4), lines, ["abc", "defghi"]):
        assert _read(source) == wanted, source
    assert _read([{"input_ids": ids}]) == _read([ids[:4], ids[4:]]) == wanted


def test_windows_are_chosen_by_the_seed() -> None:
    rows = torch.arange(24).reshape(6, 4)
    first, same, other = (_read(rows, samples=2, seed=seed) for seed in (1, 1, 2))
    assert first == same != other
    assert all(row in rows.tolist() for row in first)


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("empty.txt", b"", "QM-CALIB-002", "no tokens"),
        ("nothing.txt", b"      ", "QM-CALIB-002", "no tokens"),
        ("short.txt", b"abc", "QM-CALIB-002", "3 tokens"),
        ("binary.txt", b"\x80\x81", "QM-CALIB-001", "can't be read"),
        ("text.jsonl", b"hello\n", "QM-CALIB-001", "line 1"),
        ("keys.jsonl", b'{"a": 1}\n', "QM-CALIB-001", "no line has"),
        ("ids.jsonl", b'{"input_ids": [1, "x"]}\n', "QM-CALIB-003", "line 1"),
        ("real.jsonl", b'{"input_ids": [1.5]}\n', "QM-CALIB-003", "line 1"),
        ("one.jsonl", b'{"input_ids": 5}\n', "QM-CALIB-001", "no line has"),
        ("chat.jsonl", b'{"messages": [{}]}\n', "QM-CALIB-001", "chat template"),
        ("object.json", b"{}", "QM-CALIB-001", "no list"),
        ("junk.safetensors", b"junk" * 99, "QM-CALIB-001", "can't be read"),
    ],
)
def test_files_that_are_refused(
    name: str, content: bytes, code: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantmillError) as caught:
        _read(tmp_path / name)
    finding = caught.value.findings[0]
    assert finding.code == code
    assert words in finding.cause and name in finding.where and finding.fix


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (torch.zeros(2, 8), "QM-CALIB-003"),
        (torch.zeros(2, 8, dtype=torch.bool), "QM-CALIB-003"),
        (torch.zeros(2, 2, 8, dtype=torch.int64), "QM-CALIB-003"),
        (torch.tensor(3), "QM-CALIB-003"),
        (torch.zeros(0, 8, dtype=torch.int64), "QM-CALIB-002"),
        ([], "QM-CALIB-001"),
        ([None], "QM-CALIB-001"),
        (7, "QM-CALIB-001"),
    ],
    ids=["float", "bool", "3-D", "scalar", "no rows", "empty list", "list of None", "number"],
)
def test_objects_that_are_refused(data: Any, code: str) -> None:
    with pytest.raises(QuantmillError) as caught:
        _read(data)
    assert caught.value.findings[0].code == code
