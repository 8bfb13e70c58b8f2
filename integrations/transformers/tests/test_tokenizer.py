"""Tokenizers: with settings, bare, absent, broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import quantmill
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_llama

WORDS = ["<s>", "</s>", "<pad>", "<unk>", "a", "small", "model"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a ``tokenizer.json`` and nothing beside it."""
    path = write_tiny_llama(tmp_path / "model")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.add_special_tokens(WORDS[:4])
    made.save(str(path / "tokenizer.json"))
    return path


def settings(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def test_tokenizer_json_alone_is_enough(folder: Path) -> None:
    tokenizer = quantmill.load_tokenizer(folder)
    assert tokenizer("a small model")["input_ids"] == [0, 4, 5, 6]
    assert tokenizer.decode([4, 5, 6]) == "a small model"
    assert tokenizer("unheard")["input_ids"] == [0, 3]


def test_its_special_tokens_are_those_that_the_model_names_by_id(folder: Path) -> None:
    assert quantmill.load_tokenizer(folder).eos_token == "</s>"  # config.json has 1
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 1], "pad_token_id": 2, "bos_token_id": 999})
    )
    tokenizer = quantmill.load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<pad>", "<pad>")
    assert tokenizer.bos_token is None, "an id that the vocabulary does not have is passed over"
    batch = tokenizer(["a", "a small model"], padding=True)
    assert [len(row) for row in batch["input_ids"]] == [4, 4]


def test_settings_are_followed(folder: Path) -> None:
    settings(
        folder,
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=17,
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    tokenizer = quantmill.load_tokenizer(folder)
    assert tokenizer.model_max_length == 17 and tokenizer.padding_side == "left"
    batch = tokenizer(["a", "a small"], padding=True)["input_ids"]
    assert batch == [[2, 0, 4], [0, 4, 5]]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "small"}], tokenize=False)
    assert chat == "small "


def test_a_quantized_checkpoint_keeps_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    settings(folder, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")
    quantmill.quantize(folder, tmp_path / "out", "bnb-nf4")
    tokenizer = quantmill.load_tokenizer(tmp_path / "out")
    assert tokenizer("a small model")["input_ids"] == [0, 4, 5, 6]
    assert tokenizer.eos_token == "</s>"


def test_none_at_all_is_a_finding(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    settings(folder, tokenizer_class="PreTrainedTokenizerFast")  # settings of nothing
    with pytest.raises(QuantmillError) as caught:
        quantmill.load_tokenizer(folder)
    assert [item.code for item in caught.value.findings] == ["QM-ARCH-010"]


@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}', ""])
@pytest.mark.parametrize("with_settings", [False, True])
def test_a_broken_file_is_a_finding(folder: Path, text: str, with_settings: bool) -> None:
    (folder / "tokenizer.json").write_text(text)
    if with_settings:
        settings(folder, tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(QuantmillError) as caught:
        quantmill.load_tokenizer(folder)
    assert [item.code for item in caught.value.findings] == ["QM-TF-004"]


def test_code_of_the_checkpoint_is_not_run(folder: Path) -> None:
    settings(
        folder,
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    (folder / "own.py").write_text("raise SystemExit('ran code of the checkpoint')")
    with pytest.raises(QuantmillError) as caught:
        quantmill.load_tokenizer(folder)
    assert [item.code for item in caught.value.findings] == ["QM-TF-004"]
