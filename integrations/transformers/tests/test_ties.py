"""Tied weights in every way a checkpoint may hold them, and generation settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantmill
from quantmill_transformers.testing import sample, write

Small = Callable[[str], Path]
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def change(folder: Path, **tensors: Tensor | None) -> Path:
    """Set or remove tensors, by names with ``__`` for dots."""
    file = folder / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor.clone()
    save_file(stored, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    folder = write("llama-tied", tmp_path / "model")
    assert HEAD not in load_file(folder / "model.safetensors")
    return folder


def table(folder: Path) -> Tensor:
    return load_file(folder / "model.safetensors")[TABLE]


def is_theirs(folder: Path, ours: Any) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state, again = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_the_head_alone_may_be_stored(tied: Path) -> None:
    change(tied, lm_head__weight=table(tied), model__embed_tokens__weight=None)
    ours: Any = quantmill.load(tied)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    is_theirs(tied, ours)


def test_two_equal_copies_are_tied(tied: Path) -> None:
    change(tied, lm_head__weight=table(tied))
    ours: Any = quantmill.load(tied)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    is_theirs(tied, ours)


def test_two_different_tensors_are_not(tied: Path, tmp_path: Path) -> None:
    """The config says tied and the file says otherwise: the file outranks it, as in the peer."""
    change(tied, lm_head__weight=table(tied) + 1)
    ours: Any = quantmill.load(tied)
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    assert torch.equal(ours.lm_head.weight, table(tied) + 1)
    is_theirs(tied, ours)
    pytest.importorskip("quantmill_bnb")
    quantmill.quantize(tied, tmp_path / "out", "bnb-nf4")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[HEAD], table(tied) + 1)
    assert torch.equal(written[TABLE], table(tied))


@pytest.mark.parametrize("stored", ["shared", "encoder.embed_tokens", "decoder.embed_tokens"])
def test_any_of_the_tables_of_an_encoder_decoder_is_enough(stored: str, tmp_path: Path) -> None:
    folder = write("t5", tmp_path / "model")
    weight = load_file(folder / "model.safetensors")["shared.weight"]
    change(folder, shared__weight=None, **{f"{stored}.weight": weight})
    ours: Any = quantmill.load(folder)
    for part in (ours.shared, ours.encoder.embed_tokens, ours.decoder.embed_tokens, ours.lm_head):
        assert part.weight is ours.shared.weight
    assert torch.equal(ours.shared.weight, weight)


def test_a_lost_table_is_named_once(tied: Path) -> None:
    change(tied, model__embed_tokens__weight=None)
    with pytest.raises(quantmill.QuantmillError) as caught:
        quantmill.load(tied)
    assert [item.where for item in caught.value.findings] == [TABLE]


def test_models_of_one_folder_share_nothing(small: Small) -> None:
    pytest.importorskip("quantmill_bnb")
    first: Any = quantmill.load(small("llama"), "bnb-nf4")
    architecture = first.quantmill_job.architecture
    second = architecture.build()
    assert not hasattr(second.config, "quantization_config")
    assert second.config is not first.config


# -- generation settings ---------------------------------------------------------------------------


def test_the_generation_config_is_read(small: Small, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "model")
    settings = {"eos_token_id": [1, 5], "temperature": 0.25, "do_sample": True, "top_k": 7}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    ours: Any = quantmill.load(folder)
    assert ours.generation_config.temperature == 0.25
    assert ours.generation_config.eos_token_id == [1, 5]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_older_checkpoints_have_them_in_the_config(tmp_path: Path) -> None:
    folder = write("bart", tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    settings = {"num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    ours: Any = quantmill.load(folder)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert ours.generation_config.num_beams == theirs.generation_config.num_beams == 4
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_what_a_class_adds_to_an_embedding_comes_back(small: Small) -> None:
    """Gemma scales the rows it looks up, by a buffer that no checkpoint has."""
    pytest.importorskip("quantmill_gguf")
    model: Any = quantmill.load(small("gemma2"), "gguf-q8_0", dtype="float32")
    inputs = sample("gemma2", model)
    with torch.inference_mode():
        quantized = model(**inputs).logits
        again = quantmill.dequantize(model)(**inputs).logits
    assert type(model.model.embed_tokens).__name__ == "Gemma2TextScaledWordEmbedding"
    assert (quantized - again).norm() < 1e-4 * again.norm()
