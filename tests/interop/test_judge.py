"""transformers as the judge: one script, with our activation line and without.

Where both work they give the same; where theirs does not work, ours does. Theirs is pinned by the
constraints: a test that no longer finds its defect says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.host import default_host
from quantmill.kept import KeptLinear

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers")
qt = pytest.importorskip("quantmill_transformers")
zoo = pytest.importorskip("quantmill_transformers.testing")
ROOT = Path(__file__).parents[2]
TINY, RAGGED = ROOT / "tests" / "data" / "tiny-llama", ROOT / "tests" / "data" / "tiny-ragged"
PLUGINS = ROOT / "plugins"


def script(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """What a user runs: the same text with the activation and without."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids).logits.float()
    return logits


def off(one: Tensor, two: Tensor) -> float:
    return float((one - two).norm() / two.norm())


def meant(folder: Path, **options: Any) -> bool:
    """The model computes what its weights mean, and they are not the float ones."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        quantized = model(input_ids=ids).logits
        reference = model.dequantize()(input_ids=ids).logits
    return off(quantized, reference) < 0.02 and not torch.equal(quantized, script(TINY))


def needs(method: str) -> None:
    if method not in default_host().methods:
        pytest.skip(f"no installed plugin has {method}")


def four_bit(kind: str, nested: bool = False) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )


def torchao(name: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(getattr(quantization, name)())


def quanto(kind: str) -> Any:
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights=kind)


# -- where both work -------------------------------------------------------------------------------

ON_THE_FLY: dict[str, tuple[str, Callable[[], Any]]] = {
    "nf4": ("bnb", lambda: four_bit("nf4")),
    "nf4 twice": ("bnb", lambda: four_bit("nf4", nested=True)),
    "fp4": ("bnb", lambda: four_bit("fp4")),
    "int8": ("bnb", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": ("torchao", lambda: torchao("Int8WeightOnlyConfig")),
    "torchao float8": ("torchao", lambda: torchao("Float8WeightOnlyConfig")),
    "quanto int8": ("quanto", lambda: quanto("int8")),
    "quanto float8": ("quanto", lambda: quanto("float8")),
}
STORED = {
    "bnb-nf4": "bnb",
    "bnb-nf4-dq": "bnb",
    "bnb-fp4": "bnb",
    "bnb-int8": "bnb",
    "torchao-int8wo": "torchao",
    "ct-int8-channel": "compressed-tensors",
    "ct-float8-channel": "compressed-tensors",
    "ct-pack-int4-g64": "compressed-tensors",
}
"""Folder to the plugin that reads it."""
LIBRARIES = {
    "bnb": "bitsandbytes",
    "quanto": "optimum.quanto",
    "compressed-tensors": "compressed_tensors",
}


@pytest.mark.parametrize("case", sorted(ON_THE_FLY))
def test_a_peers_config_gives_the_same_on_the_fly(case: str) -> None:
    method, config = ON_THE_FLY[case]
    needs(method)
    theirs = script(TINY, quantization_config=config())
    with qt.activated("*"):
        ours = script(TINY, quantization_config=config())
    assert off(ours, theirs) < 1e-5


@pytest.mark.parametrize("case", ["torchao int8", "quanto int8", "quanto float8"])
def test_in_16_bits_ours_is_no_worse(case: str) -> None:
    """There they quantize in 16-bit arithmetic and we don't."""
    method, config = ON_THE_FLY[case]
    needs(method)
    wanted = script(TINY)
    theirs = script(TINY, torch.bfloat16, quantization_config=config())
    with qt.activated("*"):
        ours = script(TINY, torch.bfloat16, quantization_config=config())
    assert off(ours, wanted) < 1.1 * off(theirs, wanted)


def stored(name: str, plugin: str) -> Path:
    needs(plugin)
    pytest.importorskip(LIBRARIES.get(plugin, plugin))
    folder = ROOT / "tests" / "data" / name
    if not folder.is_dir():
        folder = PLUGINS / plugin / "tests" / "data" / name
    if not folder.is_dir():
        pytest.skip("its plugin is not here")
    return folder


@pytest.mark.parametrize("name", STORED)
def test_a_stored_checkpoint_gives_the_same(name: str) -> None:
    folder = stored(name, STORED[name])
    # Theirs reads bitsandbytes' in the dtype they were saved in, whatever it is asked for.
    dtype = torch.bfloat16 if STORED[name] == "bnb" else torch.float32
    theirs = script(folder, dtype)
    with qt.activated("*"):
        ours = script(folder, dtype)
    assert off(ours, theirs) < 1e-5


def test_what_we_write_gives_the_same_in_both(tmp_path: Path) -> None:
    written = []
    for method in ("bnb-nf4-dq", "bnb-int8", "ct-int8", "ct-int4", "torchao-int8"):
        if method not in default_host().presets:
            continue
        with qt.activated("*"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                TINY, dtype=torch.float32, quantization_config=method
            )
            model.save_pretrained(tmp_path / method)
            ours = script(tmp_path / method)
        # 4-bit computes in the config's bfloat16, packed or not.
        assert off(script(tmp_path / method), ours) < (0.02 if method == "bnb-nf4-dq" else 1e-5)
        written.append(method)
    assert written


def test_a_gguf_file_gives_the_same_and_stays_packed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Theirs makes it float (defect 10) and can't write it again (11)."""
    needs("gguf")
    pytest.importorskip("gguf")
    quantmill.quantize(TINY, tmp_path / "tiny.gguf", "gguf-q8_0")
    theirs = script(tmp_path, gguf_file="tiny.gguf")
    with qt.activated("gptq"):
        assert torch.equal(script(tmp_path, gguf_file="tiny.gguf"), theirs), "not taken over"
    with qt.activated("gguf"):
        ours = script(tmp_path, gguf_file="tiny.gguf")
        cls = transformers.LlamaForCausalLM
        model = cls.from_pretrained(tmp_path / "tiny.gguf", dtype=torch.float32, use_cache=False)
    assert off(ours, theirs) < 1e-5
    assert model.quantmill_job.plan.totals["quantized"] > 0 and model.config.use_cache is False
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "folder")
    assert 'quantmill.save(model, "model.gguf")' in caplog.text
    quantmill.save(model, tmp_path / "again.gguf")
    assert off(script(tmp_path, gguf_file="again.gguf"), theirs) < 1e-5


# -- where theirs does not -------------------------------------------------------------------------


def test_saving_after_a_forward_is_exact(tmp_path: Path) -> None:
    """Theirs writes scales that a forward on the CPU has rounded (defect 3)."""
    needs("bnb")
    for name in ("ours", "theirs"):
        with qt.activated(*(["bitsandbytes"] if name == "ours" else [])):
            config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                TINY, dtype=torch.bfloat16, quantization_config=config
            )
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            ids = torch.tensor([[5, 6, 7]])
            with torch.inference_mode():
                model(input_ids=ids)
            model.save_pretrained(tmp_path / name, save_original_format=False)
        saved = quantmill.load(tmp_path / name).state_dict()
        changed = [key for key, tensor in saved.items() if not torch.equal(tensor, before[key])]
        if name == "ours":
            assert not changed
        elif not changed:
            pytest.skip("this CPU has no kernel of theirs that repacks weights")


def test_widths_that_no_block_divides_work() -> None:
    """Theirs fails in the forward pass (defect 4)."""
    needs("bnb")
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        script(RAGGED, torch.bfloat16, quantization_config=four_bit("nf4"))
    with qt.activated("bitsandbytes"):
        ours = script(RAGGED, torch.bfloat16, quantization_config=four_bit("nf4"))
    assert off(ours, script(RAGGED)) < 0.5 and torch.isfinite(ours).all()


def test_a_users_skip_list_leaves_a_tied_head_alone(tmp_path: Path) -> None:
    """With theirs it replaces the default one, and the head breaks (defect 5)."""
    needs("bnb")
    folder = zoo.write("llama-tied", tmp_path / "model", dtype=torch.bfloat16)
    options: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, llm_int8_skip_modules=["up_proj"]
        ),
    }

    def once() -> Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        with torch.inference_mode():
            logits: Tensor = model(**zoo.sample("llama-tied", model)).logits
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert type(model.model.layers[0].mlp.up_proj) in (torch.nn.Linear, KeptLinear)
        return logits

    with pytest.raises(Exception):  # noqa: B017, PT011 whatever it is this time: it may be empty
        once()
    with qt.activated("bitsandbytes"):
        assert torch.isfinite(once()).all()


def test_hqq_works() -> None:
    """Theirs raises NotImplementedError (defect 6)."""
    needs("hqq")
    pytest.importorskip("hqq")
    config = transformers.HqqConfig(nbits=4, group_size=64)
    with pytest.raises(NotImplementedError):
        script(TINY, quantization_config=config)
    with qt.activated("hqq"):
        assert meant(TINY, quantization_config=config)


RELOAD = """
import sys, torch, transformers
if sys.argv[1] == "ours":
    import quantmill_transformers
    quantmill_transformers.activate("quanto")
make = transformers.AutoModelForCausalLM.from_pretrained
config = transformers.QuantoConfig(weights="int8")
model = make(sys.argv[2], dtype=torch.float32, quantization_config=config)
ids = torch.tensor([[5, 6, 7, 8]])
with torch.inference_mode():
    before = model(input_ids=ids).logits
model.save_pretrained(sys.argv[3])
again = make(sys.argv[3], dtype=torch.float32)
with torch.inference_mode():
    assert torch.equal(again(input_ids=ids).logits, before)
"""


def test_quanto_saves_and_reloads(tmp_path: Path) -> None:
    """Theirs refuses to save or crashes after the reload (defect 7)."""
    needs("quanto")
    pytest.importorskip("optimum.quanto")

    def run(who: str) -> int:
        command = [sys.executable, "-c", RELOAD, who, str(TINY), str(tmp_path / who)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    assert run("theirs") != 0
    assert run("ours") == 0


@pytest.mark.parametrize(
    ("name", "plugin"),
    [("quanto-int4", "quanto"), ("quanto-int8", "quanto"), ("hqq-4bit-g64-st", "hqq")],
)
def test_stored_weights_are_read_and_not_drawn_at_random(name: str, plugin: str) -> None:
    """Theirs has no place for them, says so in its log and computes with noise."""
    folder = stored(name, plugin)
    theirs = script(folder)
    with qt.activated(plugin):
        assert meant(folder) and off(theirs, script(folder)) > 0.5


@pytest.mark.parametrize(
    ("name", "plugin"),
    [
        ("gptq-4-dynamic", "gptq"),
        ("gptq-3-g32", "gptq"),
        ("awq-4-g64-gemm", "awq"),
        ("fp8-block", "fp8"),
        ("fbgemm-fp8", "fbgemm-fp8"),
    ],
)
def test_no_other_library_and_no_gpu_is_needed(name: str, plugin: str) -> None:
    needs(plugin)
    folder = PLUGINS / plugin.removeprefix("fbgemm-") / "tests" / "data" / name
    with pytest.raises((ImportError, RuntimeError, ValueError)):
        script(folder)
    with qt.activated("*"):
        assert meant(folder)


def test_asymmetric_int4_of_compressed_tensors_works() -> None:
    """Theirs refuses it (defect 8)."""
    needs("compressed-tensors")
    pytest.importorskip("compressed_tensors")
    folder = PLUGINS / "compressed-tensors" / "tests" / "data" / "ct-pack-int4-asym-g64"
    with pytest.raises(RuntimeError):
        script(folder)
    with qt.activated("compressed-tensors"):
        assert meant(folder)


def test_fused_experts_are_quantized(tmp_path: Path) -> None:
    """With theirs they stay in 16 bits in silence (defect 9)."""
    needs("bnb")
    folder = zoo.write("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, quantization_config=config)
    assert theirs.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    with qt.activated("bitsandbytes"):
        job = load(folder, quantization_config=config).quantmill_job
    experts = [item for item in job.plan.modules if ".experts." in item.name]
    assert experts and all(item.action == "quantize" for item in experts)


def test_ragged_blocks_of_fp8_are_read_right() -> None:
    """Theirs is wrong by tens of percent, without a word (defect 1)."""
    needs("fp8")
    folder = PLUGINS / "fp8" / "tests" / "data" / "fp8-block-ragged"
    with qt.activated("fp8"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        ours = script(folder, torch.bfloat16)
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wanted = model.dequantize()(input_ids=ids).logits.float()
    assert off(ours, wanted) < 0.05
    assert off(script(folder, torch.bfloat16), wanted) > 0.1


@pytest.mark.parametrize(
    "method", ["fp8-block", "fp8-row", "quanto-int4", "ct-int4-asym", "gguf-q8_0"]
)
def test_methods_that_theirs_can_not_make_here_are_made(method: str) -> None:
    """Without a GPU, or at all: the one line is the same."""
    if method not in default_host().presets:
        pytest.skip(f"no installed plugin has {method}")
    with qt.activated("*"):
        assert meant(TINY, quantization_config=method)


PEERS: dict[str, Callable[[], Any]] = {
    "gptq": lambda: transformers.GPTQConfig(bits=4, group_size=64),
    "awq": lambda: transformers.AwqConfig(bits=4, group_size=64),
    "compressed-tensors": lambda: transformers.CompressedTensorsConfig(),
    "fp8": lambda: transformers.FineGrainedFP8Config(),
    "fbgemm-fp8": lambda: transformers.FbgemmFp8Config(),
    "quanto": lambda: transformers.QuantoConfig(weights="int4"),
    "hqq": lambda: transformers.HqqConfig(nbits=4, group_size=64),
    "torchao": lambda: torchao("Int4WeightOnlyConfig"),
}


@pytest.mark.parametrize("method", sorted(PEERS))
def test_config_objects_of_the_library_are_taken(method: str) -> None:
    needs(method)
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    plan = quantmill.plan(TINY, PEERS[method]())
    plan.raise_errors()
    assert plan.totals["quantized"] == 14


def test_calibration_is_an_option_of_the_same_call() -> None:
    needs("gptq")
    ids = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1))
    with qt.activated("gptq"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            TINY,
            quantization_config=transformers.GPTQConfig(bits=4, group_size=64),
            quantmill_options={"calibration": ids, "length": 24},
        )
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"


def test_a_stored_model_is_loaded_as_float_where_a_config_object_says_so() -> None:
    needs("fp8")
    folder = PLUGINS / "fp8" / "tests" / "data" / "fp8-block"
    asked = transformers.FineGrainedFP8Config(dequantize=True)
    with qt.activated("fp8"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked)
    assert (
        not hasattr(model, "hf_quantizer")
        and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    )
    assert "quantization_config" not in model.config.to_dict()
