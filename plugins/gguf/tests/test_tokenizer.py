"""Tokenizers into files and back: the same ids for all kinds of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantmill.findings import QuantmillError
from quantmill_gguf.container import GgufFile
from quantmill_gguf.tokenizer import load_tokenizer
from quantmill_gguf.vocab.model import Files, VocabularyError
from quantmill_gguf.vocab.splits import name_of, steps_of
from quantmill_gguf.vocab.write import vocabulary_of
from quantmill_gguf.writer import GgufWriter

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    models,
    pre_tokenizers,
)

from quantmill_gguf.tiny_vocab import TEXTS, TOKENIZERS, byte_level, word_piece  # noqa: E402


def files_of(folder: Path) -> Files:
    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return Files(read)


def written(folder: Path, config: dict[str, Any], **options: Any) -> Path:
    found = vocabulary_of(files_of(folder), config, **options)
    assert found is not None
    metadata = {"general.architecture": "llama", **found.metadata()}
    path = folder / "v.gguf"
    with GgufWriter(path, metadata, [], kinds=found.kinds):
        pass
    return path


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_comes_back_with_the_same_ids(kind: str, tmp_path: Path) -> None:
    made = TOKENIZERS[kind]()
    made.save(str(tmp_path / "tokenizer.json"))
    path = written(tmp_path, {"vocab_size": made.get_vocab_size() + 7})
    back = load_tokenizer(path)
    assert len(back) == made.get_vocab_size() + 7
    for text in TEXTS:
        ids = made.encode(text).ids
        assert back(text)["input_ids"] == ids, text
        if "word" not in kind and "unigram" not in kind:
            assert back.decode(ids, skip_special_tokens=True) == made.decode(ids), text
    if kind.startswith("bytes-"):
        name = GgufFile.open(path).metadata["tokenizer.ggml.pre"]
        assert name == kind.removeprefix("bytes-")


def test_settings_beside_tokenizer_json_are_kept(tmp_path: Path) -> None:
    made = byte_level("qwen2")
    made.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<|user|>",
        "chat_template": [
            {"name": "default", "template": "{{ messages }}"},
            {"name": "tools", "template": "{{ tools }}"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    back = load_tokenizer(written(tmp_path, {}))
    assert (back.bos_token, back.eos_token, back.unk_token) == ("<s>", "</s>", "<unk>")
    assert back.pad_token == "<|user|>"
    assert back.chat_template == {"default": "{{ messages }}", "tools": "{{ tools }}"}
    metadata = GgufFile.open(tmp_path / "v.gguf").metadata
    types = list(metadata["tokenizer.ggml.token_type"])
    assert types[:4] == [3, 3, 3, 3] and types[-1] == 4 and types[4] == 1


def test_ids_come_from_the_config_where_no_file_names_them(tmp_path: Path) -> None:
    byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    back = load_tokenizer(written(tmp_path, {"bos_token_id": 1, "eos_token_id": [2, 3]}))
    assert (back.bos_token, back.eos_token) == ("<s>", "</s>")


def test_a_cut_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    made = byte_level("gpt-2")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("x+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(VocabularyError, match="no pre-tokenizer"):
        vocabulary_of(files_of(tmp_path), {})
    assert vocabulary_of(files_of(tmp_path), {}, pre="default") is not None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda d: d["model"].update(type="WordLevel"), "kind"),
        (lambda d: d["model"].update(merges=["a"]), "no pair"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "changed"),
        (lambda d: d["added_tokens"].append({"id": 1 << 30, "content": "x"}), "id"),
        (lambda d: d["added_tokens"].append({"id": 1, "content": "a"}), "are both 'a'"),
    ],
)
def test_a_damaged_tokenizer_is_named(change: Any, cause: str, tmp_path: Path) -> None:
    data = json.loads(byte_level("gpt-2").to_str())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(VocabularyError, match=cause):
        vocabulary_of(files_of(tmp_path), {})


def test_what_llama_cpp_cuts_otherwise_is_told(tmp_path: Path) -> None:
    def notes(made: Any) -> str:
        made.save(str(tmp_path / "tokenizer.json"))
        found = vocabulary_of(files_of(tmp_path), {})
        assert found is not None
        return "; ".join(found.notes)

    made = byte_level("gpt-2")
    assert notes(made) == ""
    assert "combining marks" in notes(byte_level("tekken"))
    made.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert "'<mask>' takes spaces" in notes(made)
    assert "Korean" in notes(word_piece()) and notes(word_piece(lower=False)) == ""
    made = word_piece()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(VocabularyError, match="changes text by"):
        notes(made)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(VocabularyError, match="vocabulary 10"):
        vocabulary_of(files_of(tmp_path), {"vocab_size": 10})


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.model": "rwkv"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "never-heard-of"},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"},
        {"tokenizer.ggml.model": "llama"},
        {"tokenizer.ggml.model": "t5"},
    ],
)
def test_a_damaged_vocabulary_is_named(metadata: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    tokens: dict[str, Any] = {"tokenizer.ggml.tokens": ["a", "b"]}
    if "pre" in str(metadata):
        tokens["tokenizer.ggml.merges"] = ["a c"]
    with GgufWriter(path, {**metadata, **tokens}, []):
        pass
    with pytest.raises(QuantmillError, match=r"QM-GGUF-0(23|44)"):
        load_tokenizer(path)


def test_scores_come_from_tokenizer_model(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("\u2581a", -1.5, 1), ("<0x41>", 0.0, 6)]

    def field(number: int, wire: int, body: bytes) -> bytes:
        return bytes([number << 3 | wire]) + body

    def text(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    import struct

    model = b"".join(
        field(
            1,
            2,
            text(
                field(1, 2, text(piece.encode()))
                + field(2, 5, struct.pack("<f", score))
                + field(3, 0, bytes([kind]))
            ),
        )
        for piece, score, kind in pieces
    ) + field(2, 2, text(field(3, 0, b"\x02")))
    (tmp_path / "tokenizer.model").write_bytes(model)
    found = vocabulary_of(files_of(tmp_path), {"vocab_size": 6})
    assert found is not None and found.model == "llama"
    assert found.tokens == ["<unk>", "<s>", "\u2581a", "<0x41>", "[PAD4]", "[PAD5]"]
    assert found.types == [2, 3, 1, 6, 5, 5] and found.scores is not None
    assert found.scores[2] == -1.5 and found.more["tokenizer.ggml.add_space_prefix"] is True
    (tmp_path / "tokenizer.model").write_bytes(model[:-3])
    with pytest.raises(VocabularyError):
        vocabulary_of(files_of(tmp_path), {})


def test_names_are_found_by_structure() -> None:
    data = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
    }
    steps = steps_of(data)
    assert steps is not None and name_of(steps, False) == "smollm"
    assert name_of(steps, True) is None
    assert steps_of({"type": "Whitespace"}) is None


@pytest.mark.parametrize("name", ["<s:1>", "$s", ""])
def test_tokens_that_mean_something_in_a_template_begin_a_text(name: str) -> None:
    from quantmill_gguf.vocab.read import _add_ends

    made = Tokenizer(models.BPE(vocab={name: 0, "a": 1}, merges=[]))
    keys = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    _add_ends(made, keys, "gpt2", [name, "a"])
    assert made.encode("a").ids == [0, 1]
