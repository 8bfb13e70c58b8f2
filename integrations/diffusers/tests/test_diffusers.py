"""Components and pipelines of diffusers through quantmill, one method each."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file, save_file

import quantmill
import quantmill_diffusers
from quantmill.findings import QuantmillError
from quantmill_diffusers import activate, activated, active, deactivate
from quantmill_diffusers.activation import DIFFUSERS_RANGE, PIPELINE_SYMBOL, SYMBOL
from quantmill_diffusers.testing import COMPONENTS, sample, write, write_pipeline

pytest.importorskip("quantmill_hqq")
pytest.importorskip("quantmill_bnb")
Small = Callable[[str], Path]
THERE = (
    ModelMixin.__dict__["from_pretrained"],
    DiffusionPipeline.__dict__["from_pretrained"],
)


@pytest.fixture(autouse=True)
def _nothing_is_left_active() -> Iterator[None]:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    deactivate()
    now = ModelMixin.__dict__["from_pretrained"], DiffusionPipeline.__dict__["from_pretrained"]
    assert now == THERE


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("components")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write(name, path)

    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline("dit", tmp_path_factory.mktemp("pipelines") / "dit")


def out(model: Any, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model(**sample(name, dtype), return_dict=False)[0]


def class_of(name: str) -> Any:
    return getattr(diffusers, COMPONENTS[name][0])


def codes(caught: pytest.ExceptionInfo[QuantmillError]) -> set[str]:
    return {item.code for item in caught.value.findings}


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_a_float_component_is_the_one_of_from_pretrained(name: str, small: Small) -> None:
    theirs, ours = class_of(name).from_pretrained(small(name)), quantmill.load(small(name))
    assert type(ours) is type(theirs) and not ours.training
    assert torch.equal(out(ours, name), out(theirs, name))
    one, two = theirs.state_dict(), ours.state_dict()
    assert one.keys() == two.keys() and all(one[key].dtype == two[key].dtype for key in one)
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffers[key], value) for key, value in ours.named_buffers())


@pytest.mark.parametrize("name", ["unet", "wan"])
def test_dtypes_are_those_of_from_pretrained(name: str, small: Small) -> None:
    theirs = class_of(name).from_pretrained(small(name), torch_dtype=torch.bfloat16)
    ours = quantmill.load(small(name), dtype="bfloat16")
    wanted = {key: value.dtype for key, value in theirs.state_dict().items()}
    assert {key: value.dtype for key, value in ours.state_dict().items()} == wanted
    if name == "wan":
        assert torch.float32 in wanted.values()


@pytest.mark.parametrize("method", ["bnb-nf4", "hqq-4"])
@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_quantized_written_loaded_and_float_again(
    name: str, method: str, small: Small, tmp_path: Path
) -> None:
    wanted = out(quantmill.load(small(name)), name)
    plan = quantmill.plan(small(name), method)
    plan.raise_errors()
    linears = {
        path
        for path, module in class_of(name).from_pretrained(small(name)).named_modules()
        if type(module) is torch.nn.Linear
    }
    taken = {entry.name for entry in plan.modules if entry.action == "quantize"}
    kept = {entry.name for entry in plan.modules if "keeps it" in entry.reason}
    assert taken and taken | (kept & linears) == linears
    model = quantmill.load(small(name), method)
    made = out(model, name)
    error = (made - wanted).norm() / wanted.norm()
    assert 0 < error < 0.5
    model.save_pretrained(tmp_path / "saved")
    quantmill.quantize(small(name), tmp_path / "written", method)
    for folder in ("saved", "written"):
        assert (tmp_path / folder / "diffusion_pytorch_model.safetensors").is_file()
        again = quantmill.load(tmp_path / folder)
        assert torch.equal(out(again, name), made)
    model.dequantize()
    assert not hasattr(model, "hf_quantizer") and "quantization_config" not in model.config
    model.save_pretrained(tmp_path / "float")
    plain = class_of(name).from_pretrained(tmp_path / "float")
    assert torch.equal(out(plain, name), out(model, name))


def test_old_names_of_attention_are_read(small: Small, tmp_path: Path) -> None:
    folder = write("vae", tmp_path / "old")
    file = folder / "diffusion_pytorch_model.safetensors"
    olds = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in olds.items():
            if ".attentions.0." in name:
                name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    wanted = out(quantmill.load(small("vae")), "vae")
    assert torch.equal(out(quantmill.load(folder), "vae"), wanted)
    assert quantmill.plan(folder, "hqq-4").totals["quantized"] == 8
    quantmill.quantize(folder, tmp_path / "new", "hqq-4")
    assert torch.equal(
        out(quantmill.load(tmp_path / "new"), "vae"), out(quantmill.load(folder, "hqq-4"), "vae")
    )


def test_shards_and_a_variant(small: Small, tmp_path: Path) -> None:
    wanted = out(quantmill.load(small("unet"), "hqq-4"), "unet")
    write("unet", tmp_path / "shards", save={"max_shard_size": "200KB"})
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(out(quantmill.load(tmp_path / "shards", "hqq-4"), "unet"), wanted)
    write("unet", tmp_path / "variant", save={"variant": "fp16"})
    with activated():
        made = class_of("unet").from_pretrained(
            tmp_path / "variant", variant="fp16", quantization_config="hqq-4"
        )
    assert torch.equal(out(made, "unet"), wanted)


def test_a_pipeline_takes_a_method_per_component(pipeline: Path, tmp_path: Path) -> None:
    activate()
    pipe = DiffusionPipeline.from_pretrained(
        pipeline, quantization_config={"transformer": "bnb-nf4", "vae": {"method": "hqq-4"}}
    )
    assert type(pipe) is diffusers.DiTPipeline
    labels = [pipe.transformer.quantmill_job, pipe.vae.quantmill_job]
    assert [next(iter(job.selections)) for job in labels] == ["bnb-nf4", "hqq-4"]
    pipe.set_progress_bar_config(disable=True)

    def image(made: Any) -> Any:
        made.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        return made([1], num_inference_steps=2, generator=seed, output_type="np").images

    first = image(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    for name, key in (("transformer", "bitsandbytes"), ("vae", "hqq")):
        config = json.loads((tmp_path / "saved" / name / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == key
    deactivate()
    with pytest.raises((ValueError, ImportError, RuntimeError)):  # diffusers reads no HQQ.
        DiffusionPipeline.from_pretrained(tmp_path / "saved")
    activate("*")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert hasattr(again.transformer, "quantmill_job")
    assert (image(again) == first).all()


def test_a_config_object_serves_components_too(pipeline: Path) -> None:
    from quantmill_hqq.config import HqqConfig

    with activated():
        pipe = DiffusionPipeline.from_pretrained(
            pipeline,
            quantization_config={
                "transformer": HqqConfig(nbits=8),
                "vae": diffusers.BitsAndBytesConfig(load_in_8bit=True),
            },
        )
    assert (
        pipe.transformer.config.quantization_config["quant_config"]["weight_quant_params"]["nbits"]
        == 8
    )
    assert pipe.vae.config.quantization_config["load_in_8bit"]


def test_everything_wrong_with_a_mapping_is_told_at_once(pipeline: Path) -> None:
    activate()
    with pytest.raises(QuantmillError) as caught:
        DiffusionPipeline.from_pretrained(
            pipeline,
            quantization_config={
                "transformr": "bnb-nf4",
                "scheduler": "bnb-nf4",
                "vae": "bnb-nf5",
                "transformer": {"load_in_4bit": True, "load_in_8bit": True, "nothing": 1},
            },
        )
    text = "\n".join(str(item) for item in caught.value.findings)
    assert codes(caught) == {"QM-DIFF-010", "QM-DIFF-011"}
    assert "did you mean transformer" in text and "DDIMScheduler holds no weights" in text
    assert "bnb-nf4" in text


def test_a_component_that_was_given_needs_no_method(pipeline: Path) -> None:
    vae = class_of("vae").from_pretrained(pipeline / "vae")
    with activated(), pytest.raises(QuantmillError) as caught:
        DiffusionPipeline.from_pretrained(pipeline, vae=vae, quantization_config={"vae": "hqq-4"})
    assert codes(caught) == {"QM-DIFF-010"}


def test_what_is_not_listed_stays_with_diffusers(small: Small, tmp_path: Path) -> None:
    quantmill.quantize(small("dit"), tmp_path / "nf4", "bnb-nf4")
    cls = class_of("dit")
    made = activate()
    assert made.quant_methods == () and "hqq" in made.added and "bitsandbytes" not in made.added
    assert {SYMBOL, PIPELINE_SYMBOL} == set(made.symbols) and made == active() == activate()
    assert "diffusers" in str(made)
    assert not hasattr(cls.from_pretrained(small("dit")), "quantmill_job")
    with activated("bitsandbytes"):
        assert hasattr(cls.from_pretrained(tmp_path / "nf4"), "quantmill_job")
    state = activate()
    assert state.quant_methods == ()


def test_the_cast_of_a_quantized_component_is_refused_as_theirs_is(small: Small) -> None:
    model = quantmill.load(small("unet"), "hqq-4")
    with pytest.raises(ValueError, match="quantized"):
        model.to(torch.float16)
    assert model.to("cpu") is model


def test_gradients_reach_inputs_through_checkpointing(small: Small) -> None:
    model = quantmill.load(small("unet"), "hqq-4", training=True)
    assert model.training and model.is_gradient_checkpointing
    inputs = sample("unet")
    inputs["sample"].requires_grad_(True)
    model(**inputs).sample.square().mean().backward()
    assert inputs["sample"].grad.abs().sum() > 0


def test_what_can_not_be_honoured_is_refused_all_at_once(small: Small) -> None:
    with activated(), pytest.raises(QuantmillError) as caught:
        class_of("unet").from_pretrained(
            small("unet"),
            quantization_config="hqq-4",
            use_safetensors=False,
            ignore_mismatched_sizes=True,
            device_map="auto",
            quantmill_options={"lenght": 3},
        )
    assert codes(caught) == {"QM-TAKE-011", "QM-TAKE-012"} and len(caught.value.findings) == 4


def test_arguments_of_the_library_are_taken(small: Small) -> None:
    with activated():
        model, info = class_of("unet").from_pretrained(
            small("unet").parent,
            subfolder="unet",
            quantization_config="hqq-4",
            torch_dtype=torch.bfloat16,
            device_map={"": "cpu"},
            low_cpu_mem_usage=True,
            quantmill_options={"skip": ["re:.*attn2.*"]},
            output_loading_info=True,
        )
    assert model.dtype == torch.bfloat16 and not any(info.values())
    names = [entry.name for entry in model.quantmill_job.plan.modules if entry.action == "quantize"]
    assert names and not any("attn2" in name for name in names)


def test_a_contradiction_is_an_error_with_the_difference(small: Small, tmp_path: Path) -> None:
    quantmill.quantize(small("dit"), tmp_path / "hqq", "hqq-4")
    with activated(), pytest.raises(QuantmillError) as caught:
        class_of("dit").from_pretrained(tmp_path / "hqq", quantization_config="bnb-nf4")
    assert "hqq" in str(caught.value) and "bnb" in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "shape", "class", "config"])
def test_a_broken_component_is_told_of(change: str, tmp_path: Path) -> None:
    folder = write("dit", tmp_path / "broken")
    file, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    tensors, data = load_file(file), json.loads(config.read_text())
    if change == "missing":
        del tensors["proj_out_2.weight"]
        save_file(tensors, file)
    elif change == "shape":
        tensors["proj_out_2.weight"] = torch.zeros(3, 64)
        save_file(tensors, file)
    else:
        data |= {"_class_name": "NoSuchModel"} if change == "class" else {"num_layers": "two"}
        config.write_text(json.dumps(data))
    with pytest.raises(QuantmillError) as caught:
        quantmill.load(folder, None if change == "class" else "hqq-4")
    wanted = {
        "missing": "QM-ARCH-004",
        "shape": "QM-ARCH-003",
        "class": "QM-ARCH-001",
        "config": "QM-DIFF-001",
    }
    assert codes(caught) == {wanted[change]}


@pytest.mark.parametrize("version", ["0.30.0", "1.2", ""])
def test_a_version_outside_the_range_is_refused_with_advice(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def fake(name: str) -> str:
        if name != "diffusers":
            return real(name)
        if not version:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake)
    with pytest.raises(QuantmillError) as caught:
        activate()
    (finding,) = caught.value.findings
    assert finding.code == "QM-TAKE-002" and DIFFUSERS_RANGE in finding.fix


def test_nobody_pays_for_diffusers_who_does_not_use_it() -> None:
    script = (
        "import sys, quantmill_diffusers;"
        "from quantmill.host import default_host;"
        "default_host().model_sources;"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_public_names_are_there() -> None:
    for name in quantmill_diffusers.__all__:
        assert getattr(quantmill_diffusers, name)


MEMORY = """
import sys
import quantmill
from quantmill.testing.memory import PeakMemory

small, large, method = sys.argv[1:]
quantmill.load(small, method)  # imports
with PeakMemory() as memory:
    model = quantmill.load(large, method)
print(memory.bytes, model.quantmill_job.plan.totals["bytes_memory"])
"""


@pytest.mark.slow
def test_the_float_weights_are_never_whole_in_memory(small: Small, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 16, "attention_head_dim": 48, "num_layers": 8}
    with torch.device("meta"):
        model = diffusers.DiTTransformer2DModel(**{**COMPONENTS["dit"][1], **sizes})
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    model.save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", MEMORY, str(small("dit")), str(tmp_path / "large"), "bnb-nf4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    above, planned = map(int, done.stdout.split())
    bound = 1.15 * planned + (64 << 20)
    assert above <= bound < 2 * sum(item.numel() for item in model.parameters())
