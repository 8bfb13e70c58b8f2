"""``device_map``: computed and written ones, weights on the disk, accelerate's hooks."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill.hookspecs import hookimpl
from quantmill.host import Host, default_host
from quantmill_transformers import activated
from quantmill_transformers.offload import OffloadedLinear
from quantmill_transformers.testing import MODELS, sample, write

Small = Callable[[str], Path]
pytest.importorskip("quantmill_bnb")
pytest.importorskip("accelerate")
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}


@pytest.fixture(autouse=True)
def _active() -> Iterator[None]:
    with activated("*"):
        yield


@pytest.fixture(scope="module")
def stored(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "llama"
    quantmill.quantize(small("llama"), folder, "bnb-nf4")
    return folder


def logits(name: str, model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**sample(name, model)).logits
    return found


def codes(caught: pytest.ExceptionInfo[QuantmillError]) -> dict[str, str]:
    assert all(item.cause and item.fix for item in caught.value.findings)
    return {item.where: item.code for item in caught.value.findings}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")])
def test_one_device_needs_no_hooks(device_map: Any, stored: Path) -> None:
    model = load(stored, device_map=device_map)
    assert not hasattr(model, "_hf_hook")
    assert torch.equal(logits("llama", model), logits("llama", load(stored)))


def test_layers_on_the_disk_compute_the_same(stored: Path) -> None:
    model, whole = load(stored, device_map=SPLIT), load(stored)
    assert model.hf_device_map == SPLIT
    on_disk, kept = model.model.layers[1], model.model.layers[0]
    assert {type(part) for part in on_disk.modules() if hasattr(part, "in_features")} == {
        OffloadedLinear
    }
    assert not any(isinstance(part, OffloadedLinear) for part in kept.modules())
    assert on_disk.input_layernorm.weight.is_meta and model.model.norm.weight.is_meta
    for _ in range(2):
        assert torch.equal(logits("llama", model), logits("llama", whole))
    assert model.model.norm.weight.is_meta, "dropped after use"
    inputs = sample("llama", model)
    made = [m.generate(**inputs, max_new_tokens=3, do_sample=False) for m in (model, whole)]
    assert torch.equal(*made)


@pytest.mark.parametrize("method", ["bnb-nf4-dq", "bnb-int8", "hqq-4", "fp8-block", "quanto-int4"])
def test_any_method_is_offloaded_on_the_fly(method: str, small: Small, tmp_path: Path) -> None:
    if method not in default_host().presets:
        pytest.skip(f"no installed plugin has {method}")
    options = {"quantization_config": method, "dtype": "bfloat16"}
    model = load(small("llama"), device_map=SPLIT, offload_folder=str(tmp_path / "off"), **options)
    assert any(isinstance(part, OffloadedLinear) for part in model.modules())
    whole = load(small("llama"), **options)
    assert torch.equal(logits("llama", model), logits("llama", whole))
    # What is saved is what the whole model is.
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    for key, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_auto_fills_the_memory_that_is_allowed_by_the_plans_sizes(
    small: Small, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quantization_config": "bnb-nf4", "dtype": "bfloat16"}
    plan = load(small("llama"), **options).quantmill_job.plan
    allowed = int(plan.totals["bytes_memory"] * 0.8)
    model = load(
        small("llama"),
        device_map="auto",
        max_memory={"cpu": allowed},
        offload_folder=str(tmp_path / "off"),
        **options,
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits("llama", model), logits("llama", load(small("llama"), **options)))


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "llava", "mixtral"])
def test_other_models_are_offloaded(name: str, small: Small, tmp_path: Path) -> None:
    cls = getattr(transformers, MODELS[name].cls)
    options: dict[str, Any] = {"quantization_config": "bnb-nf4"}
    whole = cls.from_pretrained(small(name), **options)
    size = int(whole.quantmill_job.plan.totals["bytes_memory"])
    model = cls.from_pretrained(
        small(name),
        device_map="auto",
        max_memory={"cpu": int(size * 0.7)},
        offload_folder=str(tmp_path / "off"),
        **options,
    )
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(logits(name, model), logits(name, whole))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("skip", [(), ("role:expert",)])
def test_experts_are_offloaded(skip: tuple[str, ...], original: bool, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_hqq")
    folder = write("mixtral", tmp_path / "m", save={"save_original_format": original})
    plain = quantmill.load(folder, "hqq-4", skip=skip)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config={"method": "hqq-4", "skip": list(skip)},
        device_map={"": "cpu", "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "off"),
        dtype=torch.float32,
    )
    found = [part for part in model.modules() if isinstance(part, OffloadedLinear)]
    assert len(found) == (4 if skip else 16)
    assert torch.allclose(logits("mixtral", model), logits("mixtral", plain), atol=1e-5)
    if skip:
        assert model.model.layers[1].mlp.experts.gate_up_proj.is_meta


def test_tied_weights_go_to_the_disk_together(small: Small, tmp_path: Path) -> None:
    both = {**SPLIT, "model.embed_tokens": "disk", "lm_head": "disk"}
    folder = small("llama-tied")
    model = load(
        folder,
        quantization_config="bnb-nf4",
        device_map=both,
        offload_folder=str(tmp_path / "off"),
    )
    whole = load(folder, quantization_config="bnb-nf4")
    assert torch.equal(logits("llama", model), logits("llama", whole))


def test_a_split_tie_is_an_error(small: Small, tmp_path: Path) -> None:
    with pytest.raises(FindingsError) as caught:
        load(
            small("llama-tied"),
            quantization_config="bnb-nf4",
            device_map={**SPLIT, "lm_head": "disk"},
            offload_folder=str(tmp_path),
        )
    assert codes(caught) == {"lm_head.weight": "QM-TF-021"}
    assert "cpu" in caught.value.findings[0].cause and "disk" in caught.value.findings[0].cause


def test_a_map_that_fits_nothing_is_an_error_with_every_reason(stored: Path) -> None:
    wrong = {"model.layers.0": "cpu", "model.layers.7": "disk", "model.layers.1": "tpu"}
    with pytest.raises(FindingsError) as caught:
        load(stored, device_map={**wrong, "model.norm": 99})
    found = codes(caught)
    assert set(found.values()) == {"QM-TF-020"}
    assert {"model.layers.7", "model.layers.1", "model.norm"} < set(found)
    assert any("embed_tokens" in where or "lm_head" in where for where in found)
    for nonsense in (-1, "fast", {}):
        with pytest.raises(QuantmillError) as caught:
            load(stored, device_map=nonsense)
        assert codes(caught) == {"device_map": "QM-TF-020"}


def test_disk_without_a_folder_is_an_error_on_the_fly(small: Small) -> None:
    with pytest.raises(FindingsError) as caught:
        load(small("llama"), quantization_config="bnb-nf4", device_map=SPLIT)
    assert set(codes(caught).values()) == {"QM-TF-023"}


def test_a_method_that_can_not_be_stored_is_not_offloaded(small: Small, tmp_path: Path) -> None:
    """Declared by the method, not known by its name."""
    host = Host()
    method = host.methods["bnb"]
    unable = dataclasses.replace(
        method,
        name="fleeting",
        aliases=(),
        presets=(),
        quant_methods=("fleeting",),
        capabilities=dataclasses.replace(method.capabilities, serialisable=False),
    )
    plugin = types.ModuleType("fleeting")
    plugin.QUANTMILL_API = 1  # type: ignore[attr-defined]
    plugin.quantmill_methods = hookimpl(lambda: [unable])  # type: ignore[attr-defined]
    plugin.quantmill_methods.__name__ = "quantmill_methods"  # type: ignore[attr-defined]
    assert host.add(plugin, "fleeting").status.value == "ok"
    with activated(host=host), pytest.raises(FindingsError) as caught:
        load(
            small("llama"),
            quantization_config={"method": "fleeting", "load_in_8bit": True},
            device_map=SPLIT,
            offload_folder=str(tmp_path),
        )
    assert set(codes(caught).values()) == {"QM-TF-022"}


def test_an_offloaded_model_becomes_float(stored: Path) -> None:
    model = load(stored, device_map=SPLIT).dequantize()
    reference = load(stored).dequantize()
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert torch.equal(logits("llama", model), logits("llama", reference))


def test_hooks_can_be_taken_off_again(stored: Path) -> None:
    from accelerate.hooks import remove_hook_from_module

    model = load(stored, device_map={"": "cpu", "model.layers.1": "disk"})
    remove_hook_from_module(model, recurse=True)
    assert not any(hasattr(part, "_hf_hook") for part in model.modules())
