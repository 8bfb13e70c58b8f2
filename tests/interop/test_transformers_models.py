"""Beside transformers' own bitsandbytes quantizer, for many architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill

bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
testing = pytest.importorskip("quantmill_transformers.testing")

pytestmark = pytest.mark.interop
Small = Callable[[str], Path]
NAMES = sorted(testing.MODELS)
# Classification heads: we keep output heads float. The peer means to keep the last module too, but
# looks at the last parameter, and misses a head that has a bias.
# Routers too, of which the peer keeps some.
HEADS = {
    "bert-classifier": {"classifier"},
    "vit": {"classifier"},
    "qwen2-moe": {f"model.layers.{layer}.mlp.shared_expert_gate" for layer in range(2)},
}
# Rows that are no multiple of 32 fail in the peer's CPU kernel.
UNEVEN = {"qwen2-moe", "deepseek-v3", "resnet"}
# The peer keeps stacked experts in 16 bits, and can't read others.
MIXTURES = {"mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3", "gpt-oss"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    root = tmp_path_factory.mktemp("small")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else testing.write(name, path, dtype=torch.bfloat16)

    return folder


def peer(name: str, folder: Path, **options: Any) -> Any:
    return getattr(transformers, testing.MODELS[name].cls).from_pretrained(folder, **options)


def quantized(model: torch.nn.Module) -> set[str]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name for name, part in model.named_modules() if isinstance(part, kinds)}


def same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    state, other = one.state_dict(), two.state_dict()
    assert set(state) == set(other)
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), other[name].float()), name
        assert tensor.dtype == other[name].dtype, name


def skipped(name: str) -> list[str]:
    return ["**.experts.**"] if name in MIXTURES else []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_modules_are_quantized_to_the_same_bits(name: str, small: Small) -> None:
    options = {"include": sorted(HEADS.get(name, ())), "skip": skipped(name)}
    theirs = peer(
        name, small(name), quantization_config=transformers.BitsAndBytesConfig(**NF4), dtype="auto"
    )
    ours = quantmill.load(small(name), "bnb-nf4", **options)
    assert quantized(ours) == quantized(theirs)
    same(ours, theirs)
    plain = quantmill.plan(small(name), "bnb-nf4", skip=skipped(name))
    planned = {item.name for item in plan_targets(plain)}
    assert quantized(theirs) - planned == HEADS.get(name, set())
    assert planned <= quantized(theirs)


def plan_targets(plan: Any) -> list[Any]:
    return [item for item in plan.modules if item.action == "quantize"]


@pytest.mark.parametrize("how", ["quantize", "save_pretrained"])
@pytest.mark.parametrize("name", NAMES)
def test_the_peer_loads_what_we_write(name: str, how: str, small: Small, tmp_path: Path) -> None:
    ours: Any = quantmill.load(small(name), "bnb-nf4", skip=skipped(name))
    if how == "quantize":
        quantmill.quantize(small(name), tmp_path / "out", "bnb-nf4", skip=skipped(name))
    else:
        ours.save_pretrained(tmp_path / "out")
    theirs = peer(name, tmp_path / "out")
    assert quantized(theirs) == quantized(ours)
    same(ours, theirs)
    if name in UNEVEN:
        return
    with torch.inference_mode():
        inputs = testing.sample(name, ours)
        one, two = ours(**inputs).logits.float(), theirs(**inputs).logits.float()
    assert (one - two).norm() <= 0.02 * two.norm()


@pytest.mark.parametrize("name", NAMES)
def test_we_load_what_the_peer_writes(name: str, small: Small, tmp_path: Path) -> None:
    if name == "falcon":
        pytest.skip("it has nothing that the peer quantizes")
    config = transformers.BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True)
    theirs = peer(name, small(name), quantization_config=config, dtype="auto")
    theirs.save_pretrained(tmp_path / "out")
    ours = quantmill.load(tmp_path / "out")
    assert quantized(ours) == quantized(theirs)
    same(ours, theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5", "mixtral", "gpt-neox", "vit"])
def test_int8_is_the_same_too(name: str, small: Small, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs = peer(name, small(name), quantization_config=config, dtype="auto")
    options = {"include": sorted(HEADS.get(name, ())), "skip": skipped(name)}
    ours = quantmill.load(small(name), "bnb-int8", **options)
    assert quantized(ours) == quantized(theirs)
    state, other = ours.state_dict(), theirs.state_dict()
    for key in state:
        assert torch.equal(state[key], other[key]), key
    quantmill.quantize(small(name), tmp_path / "out", "bnb-int8", skip=skipped(name))
    again = peer(name, tmp_path / "out")
    assert quantized(again) == quantized(ours) - HEADS.get(name, set())


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "vit", "t5"])
def test_a_users_skip_reaches_the_peer(name: str, small: Small, tmp_path: Path) -> None:
    skipped = plan_targets(quantmill.plan(small(name), "bnb-nf4"))[1].name
    quantmill.quantize(small(name), tmp_path / "out", "bnb-nf4", skip=[skipped])
    live: Any = quantmill.load(small(name), "bnb-nf4", skip=[skipped])
    live.save_pretrained(tmp_path / "saved")
    for folder in ("out", "saved"):
        theirs = peer(name, tmp_path / folder)
        assert skipped not in quantized(theirs)
        same(live, theirs)


def test_old_experts_are_kept_for_the_peer(tmp_path: Path) -> None:
    """Version 5 saves a Mixtral with each expert by itself: written so, and read so."""
    folder = testing.write("mixtral", tmp_path / "float", num_local_experts=12)
    options = {"skip": skipped("mixtral")}
    quantmill.quantize(folder, tmp_path / "out", "bnb-nf4", **options)
    same(quantmill.load(folder, "bnb-nf4", **options), peer("mixtral", tmp_path / "out"))
