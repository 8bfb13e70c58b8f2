"""``from_pretrained`` with our loader: models of many kinds, every argument, saving and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill_transformers import activated
from quantmill_transformers.testing import MODELS, sample, write

Small = Callable[[str], Path]
pytest.importorskip("quantmill_bnb")
AUTO: Mapping[str, Any] = {
    "llama-tied": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "mixtral": AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "bart": transformers.AutoModelForSeq2SeqLM,
    "bert": transformers.AutoModelForMaskedLM,
    "bert-classifier": transformers.AutoModelForSequenceClassification,
    "vit": transformers.AutoModelForImageClassification,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
    "llava": transformers.AutoModelForImageTextToText,
}


@pytest.fixture(autouse=True)
def _active() -> Iterator[None]:
    with activated("bitsandbytes"):
        yield


def logits(name: str, model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**sample(name, model)).logits
    return found


def codes(caught: pytest.ExceptionInfo[QuantmillError]) -> dict[str, str]:
    assert all(item.cause and item.fix for item in caught.value.findings)
    return {item.where: item.code for item in caught.value.findings}


# -- kinds of models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(AUTO))
def test_auto_classes_give_what_load_gives(name: str, small: Small, tmp_path: Path) -> None:
    folder, auto = small(name), AUTO[name]
    model = auto.from_pretrained(folder, quantization_config="bnb-nf4")
    assert type(model).__name__ == MODELS[name].cls and not model.training
    wanted = quantmill.load(folder, "bnb-nf4")
    assert torch.equal(logits(name, model), logits(name, wanted))
    assert model.config.name_or_path == str(folder)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved")
    assert hasattr(again, "quantmill_job")
    assert torch.equal(logits(name, again), logits(name, model))
    assert set(again.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", ["llama-tied", "t5", "vit", "llava"])
def test_what_is_saved_transformers_loads_alone(name: str, small: Small, tmp_path: Path) -> None:
    model = AUTO[name].from_pretrained(small(name), quantization_config="bnb-nf4")
    model.save_pretrained(tmp_path / "ours")
    with activated("gptq"):
        pass  # Nested blocks leave the outer one active.
    theirs = getattr(transformers, MODELS[name].cls)
    alone = _without_us(lambda: theirs.from_pretrained(tmp_path / "ours"))
    assert not hasattr(alone, "quantmill_job")
    # And what they save we load again; saving once more under old names they don't have.
    with pytest.raises(NotImplementedError):
        alone.save_pretrained(tmp_path / "no")
    # And before they compute: a forward on a CPU repacks their weights in place.
    alone.save_pretrained(tmp_path / "theirs", save_original_format=False)
    back = AUTO[name].from_pretrained(tmp_path / "theirs")
    assert hasattr(back, "quantmill_job")
    state = back.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    error = (logits(name, alone) - logits(name, model)).norm() / logits(name, model).norm()
    assert error < 0.02


def _without_us(call: Callable[[], Any]) -> Any:
    from quantmill_transformers import activate, deactivate

    deactivate()
    try:
        return call()
    finally:
        activate("bitsandbytes")


def test_the_base_of_a_model_loads_from_its_checkpoint(small: Small, tmp_path: Path) -> None:
    quantmill.quantize(small("llama"), tmp_path / "out", "bnb-nf4")
    base = AutoModel.from_pretrained(tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = sample("llama", whole)
    with torch.inference_mode():
        assert torch.equal(base(**ids)[0], whole.model(**ids)[0])
    assert {item.where for item in base.quantmill_job.findings if item.code == "QM-ARCH-005"} == {
        "lm_head.weight"
    }


def test_a_new_head_is_made_kept_float_and_told_of(
    small: Small, caplog: pytest.LogCaptureFixture
) -> None:
    auto = transformers.AutoModelForSequenceClassification
    with caplog.at_level(logging.WARNING, "quantmill_transformers"):
        model, info = auto.from_pretrained(
            small("llama"), quantization_config="bnb-nf4", num_labels=3, output_loading_info=True
        )
    assert model.score.weight.shape == (3, 64) and type(model.score) is nn.Linear
    assert 0 < float(model.score.weight.std()) < 0.1
    assert info["missing_keys"] == {"score.weight"} and info["unexpected_keys"] == {
        "lm_head.weight"
    }
    assert "QM-TF-005" in caplog.text and "score.weight" in caplog.text


def test_a_lost_layer_is_no_new_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = write("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v.clone() for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(FindingsError) as caught:
        auto.from_pretrained(folder, quantization_config="bnb-nf4")
    assert codes(caught) == {"model.layers.1.mlp.up_proj.weight": "QM-ARCH-004"}


# -- configs ---------------------------------------------------------------------------------------

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    "config",
    [
        "bnb-nf4-dq",
        "bnb-nf4:bnb_4bit_use_double_quant=true",
        {"method": "bnb-nf4-dq"},
        {"quant_method": "bitsandbytes", **FOUR_BIT},
        FOUR_BIT,
        '{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4",'
        ' "bnb_4bit_use_double_quant": true}',
        transformers.BitsAndBytesConfig(**FOUR_BIT),
    ],
    ids=["short", "option", "method", "dict", "marker", "json", "peer"],
)
def test_any_spelling_of_a_config_is_taken(config: Any, small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config=config)
    assert model.quantmill_job.plan.methods and model.is_loaded_in_4bit
    assert model.config.quantization_config.bnb_4bit_use_double_quant is True


def test_a_typed_config_and_a_file_are_taken(small: Small, tmp_path: Path) -> None:
    from quantmill_bnb.config import BnbConfig

    typed = BnbConfig.from_user({"load_in_8bit": True})
    (tmp_path / "method.yaml").write_text("method: bnb-int8\n")
    for config in (typed, str(tmp_path / "method.yaml")):
        model = AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config=config)
        assert model.is_loaded_in_8bit


def test_a_misspelt_field_is_an_error(small: Small) -> None:
    """Transformers takes it in silence."""
    wrong = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}
    with pytest.raises(QuantmillError) as caught:
        AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config=wrong)
    assert codes(caught) == {"bnb_4bit_quant_typ": "QM-CONFIG-001"}


def test_patterns_skip_and_assign(small: Small) -> None:
    config = {
        "method": "bnb-nf4",
        "skip": ["model.layers.0.mlp.*"],
        "assign": {"role:attention": "bnb-int8"},
    }
    model = AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config=config)
    layers = model.model.layers
    assert type(layers[0].mlp.up_proj) is nn.Linear
    assert type(layers[1].mlp.up_proj).__name__ == "QuantmillLinear4bit"
    assert type(layers[0].self_attn.q_proj).__name__ == "QuantmillLinear8bit"
    assert type(model.lm_head) is nn.Linear, "defaults stay in force"


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "auto", None])
def test_dtype_is_honoured(dtype: Any, small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        small("llama"), quantization_config="bnb-nf4", dtype=dtype
    )
    wanted = torch.float32 if dtype in ("auto", None) else getattr(torch, str(dtype).split(".")[-1])
    assert model.dtype == model.config.dtype == wanted


def test_a_config_of_ones_own_is_honoured(small: Small) -> None:
    config = AutoConfig.from_pretrained(small("llama"))
    config.rms_norm_eps, config.dtype = 0.25, torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        small("llama"), config=config, quantization_config="bnb-nf4"
    )
    assert model.model.norm.variance_epsilon == 0.25 and model.dtype == torch.bfloat16
    assert not hasattr(config, "quantization_config"), "the user's object is not touched"
    by_name = transformers.LlamaForCausalLM.from_pretrained(
        small("llama"), quantization_config="bnb-nf4", output_attentions=True
    )
    assert by_name.config.output_attentions is True


def test_implementations_generation_and_subfolder_are_honoured(
    small: Small, tmp_path: Path
) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "part").symlink_to(small("llama"))
    mine = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repo",
        subfolder="part",
        quantization_config="bnb-nf4",
        attn_implementation="eager",
        generation_config=mine,
    )
    assert model.config._attn_implementation == "eager"
    assert model.generate(torch.tensor([[5, 6]])).shape == (1, 5)


def test_what_can_not_be_honoured_is_refused_all_at_once(small: Small) -> None:
    with pytest.raises(QuantmillError) as caught:
        AutoModelForCausalLM.from_pretrained(
            small("llama"),
            quantization_config="bnb-nf4",
            use_safetensors=False,
            variant="fp16",
            ignore_mismatched_sizes=True,
            tp_plan="auto",
            key_mapping={"a": "b"},
            quantmill_options={"lenght": 3},
        )
    assert codes(caught) == {
        "use_safetensors": "QM-TAKE-011",
        "variant": "QM-TAKE-011",
        "ignore_mismatched_sizes": "QM-TAKE-011",
        "tp_plan": "QM-TAKE-011",
        "key_mapping": "QM-TAKE-011",
        "lenght": "QM-TAKE-012",
    }


def test_what_means_nothing_here_is_taken(small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        small("llama"),
        quantization_config="bnb-nf4",
        low_cpu_mem_usage=True,
        use_safetensors=True,
        trust_remote_code=False,
        weights_only=True,
    )
    assert hasattr(model, "quantmill_job")


def test_options_of_load_are_taken(small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        small("llama"), quantization_config="bnb-nf4", quantmill_options={"training": True}
    )
    assert model.training and model.is_gradient_checkpointing


def test_a_pipeline_goes_through_us(small: Small) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(96)}, "w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = transformers.pipeline(
        "text-generation",
        model=str(small("llama")),
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2"),
        model_kwargs={"quantization_config": "bnb-nf4"},
    )
    assert hasattr(pipe.model, "quantmill_job")
    assert pipe("w5 w6", max_new_tokens=2, do_sample=False)[0]["generated_text"]


# -- what transformers does with a quantized model -------------------------------------------------


def test_the_library_sees_a_quantized_model(small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config="bnb-nf4")
    assert model.is_quantized and model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    with pytest.raises(ValueError, match="half"):
        model.half()
    stored = model.config.to_dict()["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    json.dumps(stored)
    float_model = model.dequantize()
    assert not float_model.is_quantized and not hasattr(float_model, "hf_quantizer")
    assert "quantization_config" not in float_model.config.to_dict()
    assert float_model.to(torch.float64).dtype == torch.float64


def test_generate_and_compile_agree_with_eager(small: Small) -> None:
    model = AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config="bnb-int8")
    inputs = sample("llama", model)
    eager = logits("llama", model)
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        found = compiled(**inputs).logits
    torch._dynamo.reset()
    assert (found - eager).norm() / eager.norm() < 1e-3
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 13)


def test_a_folder_is_ready_to_be_pushed(small: Small, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config="bnb-nf4")
    model.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names
    text = (tmp_path / "out" / "config.json").read_text()
    assert str(small("llama")) not in text, "no path of this machine"
    plan = quantmill.plan(tmp_path / "out")
    plan.raise_errors()
    assert plan.totals["quantized"] == model.quantmill_job.plan.totals["quantized"]
