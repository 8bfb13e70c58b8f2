"""Pipelines of two frameworks at once, and diffusers' own quantizers as the judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import quantmill_diffusers  # noqa: E402
import quantmill_transformers  # noqa: E402
from quantmill.findings import QuantmillError  # noqa: E402
from quantmill_diffusers.testing import sample, write, write_pipeline  # noqa: E402

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield
    quantmill_diffusers.deactivate()
    quantmill_transformers.deactivate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline("stable-diffusion", tmp_path_factory.mktemp("pipeline") / "sd")


def image(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("a b", num_inference_steps=2, generator=seed, output_type="np").images


def test_one_mapping_for_components_of_two_frameworks(folder: Path, tmp_path: Path) -> None:
    quantmill_diffusers.activate()
    quantmill_transformers.activate()
    method = {"method": "hqq-4", "skip": ["re:.*fc1"]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder,
        quantization_config={"unet": "bnb-nf4", "text_encoder": method, "vae": "quanto-int8"},
    )
    made = image(pipe)
    for name, label in (("unet", "bnb-nf4"), ("text_encoder", "hqq-4"), ("vae", "quanto-int8")):
        job = getattr(pipe, name).quantmill_job
        assert list(job.selections) == [label] and job.plan.totals["quantized"] > 0
    pipe.save_pretrained(tmp_path / "saved")
    quantmill_diffusers.activate("*")
    quantmill_transformers.activate("*")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert hasattr(again.unet, "quantmill_job") and hasattr(again.text_encoder, "quantmill_job")
    assert (image(again) == made).all()


def test_a_text_encoder_needs_the_other_activation(folder: Path) -> None:
    quantmill_diffusers.activate()
    with pytest.raises(QuantmillError) as caught:
        diffusers.DiffusionPipeline.from_pretrained(
            folder, quantization_config={"text_encoder": "hqq-4"}
        )
    (finding,) = caught.value.findings
    assert finding.code == "QM-DIFF-012" and "quantmill_transformers.activate" in finding.fix


def test_bitsandbytes_works_where_theirs_wants_a_gpu(tmp_path: Path) -> None:
    source = write("unet", tmp_path / "float")
    cls = diffusers.UNet2DConditionModel
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="GPU"):
            cls.from_pretrained(source, quantization_config=config)
    with quantmill_diffusers.activated("bitsandbytes"):
        ours = cls.from_pretrained(source, quantization_config=config)
        plain = cls.from_pretrained(source)
        inputs = sample("unet")
        with torch.no_grad():
            made, wanted = ours(**inputs).sample, plain(**inputs).sample
        assert 0 < (made - wanted).norm() / wanted.norm() < 0.2
        ours.save_pretrained(tmp_path / "ours")
        again = cls.from_pretrained(tmp_path / "ours")
        with torch.no_grad():
            assert torch.equal(again(**inputs).sample, made)


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_diffusers_own_quanto_gives_the_same(name: str, tmp_path: Path) -> None:
    source = write(name, tmp_path / "float")
    cls = getattr(diffusers, "UNet2DConditionModel" if name == "unet" else "FluxTransformer2DModel")
    config = diffusers.QuantoConfig(weights_dtype="int8")
    theirs = cls.from_pretrained(source, quantization_config=config)
    with quantmill_diffusers.activated("quanto"):
        ours = cls.from_pretrained(source, quantization_config=config)
    assert hasattr(ours, "quantmill_job") and not hasattr(theirs, "quantmill_job")
    inputs = sample(name)
    with torch.no_grad():
        one, two = (model(**inputs, return_dict=False)[0] for model in (theirs, ours))
    assert torch.allclose(one, two, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
