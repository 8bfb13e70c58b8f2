"""What vLLM's config parsers and loaders ask of a folder, checked on folders that we write.

The expectations are vLLM's (model_executor/layers/quantization): keys that its parsers read and
refuse to miss, values they accept, tensors that its linear methods create. They are stated here,
since vLLM can't be installed beside us; ``benchmarks/interop_vllm.py`` asks vLLM itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantmill

testing = pytest.importorskip("quantmill_transformers.testing")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.interop

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"
OUT, IN = 128, 256
"""Of ``mlp.down_proj``."""
Tensors = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "llama"
    made: Path = testing.write(
        "llama",
        folder,
        dtype=torch.bfloat16,
        hidden_size=OUT,
        intermediate_size=IN,
        head_dim=32,
        num_hidden_layers=1,
    )
    return made


def shape(tensors: Tensors, name: str, dtype: torch.dtype, *wanted: int) -> bool:
    return tensors[name].dtype == dtype and tuple(tensors[name].shape) == wanted


def gptq(config: Any, tensors: Tensors) -> None:
    bits, group = config["bits"], config["group_size"]
    assert (bits, config["sym"]) in {(4, True), (8, True)} and config["desc_act"] in (True, False)
    assert not config["lm_head"] and not config.get("dynamic")
    assert shape(tensors, "qweight", torch.int32, IN * bits // 32, OUT)
    assert shape(tensors, "qzeros", torch.int32, IN // group, OUT * bits // 32)
    assert shape(tensors, "g_idx", torch.int32, IN)
    assert tuple(tensors["scales"].shape) == (IN // group, OUT)


def awq(config: Any, tensors: Tensors) -> None:
    group = config["group_size"]
    assert config["bits"] == 4 and config["zero_point"] is True and config["version"] == "gemm"
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert shape(tensors, "qweight", torch.int32, IN, OUT // 8)
    assert shape(tensors, "qzeros", torch.int32, IN // group, OUT // 8)
    assert tuple(tensors["scales"].shape) == (IN // group, OUT)


def bitsandbytes(config: Any, tensors: Tensors) -> None:
    assert config["bnb_4bit_quant_storage"] == "uint8"
    assert config["load_in_4bit"] != config["load_in_8bit"]
    if config["load_in_8bit"]:
        assert shape(tensors, "weight", torch.int8, OUT, IN)
        assert shape(tensors, "SCB", torch.float32, OUT)
        return
    assert shape(tensors, "weight", torch.uint8, OUT * IN // 2, 1)
    kind = config["bnb_4bit_quant_type"]
    assert f"weight.quant_state.bitsandbytes__{kind}" in tensors
    assert {"weight.absmax", "weight.quant_map"} <= tensors.keys()
    nested = {"weight.nested_absmax", "weight.nested_quant_map"} <= tensors.keys()
    assert nested == config["bnb_4bit_use_double_quant"]


def fp8(config: Any, tensors: Tensors) -> None:
    assert config["activation_scheme"] == "dynamic" and not config.get("ignored_layers")
    assert config["modules_to_not_convert"] == ["lm_head"]
    rows, columns = config["weight_block_size"]
    assert shape(tensors, "weight", torch.float8_e4m3fn, OUT, IN)
    assert shape(tensors, "weight_scale_inv", torch.float32, -(-OUT // rows), -(-IN // columns))


def fbgemm(config: Any, tensors: Tensors) -> None:
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert isinstance(config["activation_scale_ub"], float)
    assert shape(tensors, "weight", torch.float8_e4m3fn, OUT, IN)
    assert shape(tensors, "weight_scale", torch.float32, OUT, 1)


def hqq(config: Any, tensors: Tensors) -> None:
    weights = config["quant_config"]["weight_quant_params"]
    assert weights["nbits"] == 4 and weights["group_size"] == 64 and weights["axis"] == 1
    assert config["skip_modules"] == ["lm_head"]
    groups = OUT * IN // 64
    assert shape(tensors, "W_q", torch.uint8, groups // 2, 64)
    assert tensors["scale"].numel() == tensors["zero"].numel() == groups
    # Names beside these that are not of hqq's own list have no place to go.
    known = {"W_q", "scale", "zero", "axis", "channel_wise", "compute_dtype", "encoded_state_dict"}
    known |= {"group_size", "nbits", "offload_meta", "optimize", "packing", "quant_scale"}
    known |= {"quant_zero", "round_zero", "shape", "stores_quant_config", "unpack_view_dtype"}
    assert tensors.keys() <= known | {"view_as_float"}


def compressed(config: Any, tensors: Tensors) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    # The library's own model of the arguments is what vLLM validates them with.
    weights = quantization.QuantizationArgs.model_validate(group["weights"])
    inputs = group["input_activations"]
    if inputs is not None:
        assert quantization.QuantizationArgs.model_validate(inputs).dynamic
    assert not weights.dynamic
    style = config["format"]
    if style == "pack-quantized":
        assert inputs is None
        words = -(-IN * weights.num_bits // 32)
        assert shape(tensors, "weight_packed", torch.int32, OUT, words)
        assert tensors["weight_shape"].tolist() == [OUT, IN]
        columns = IN // weights.group_size if weights.group_size else 1
        assert tuple(tensors["weight_scale"].shape) == (OUT, columns)
        assert ("weight_zero_point" in tensors) == (not weights.symmetric)
    elif style in ("int-quantized", "float-quantized"):
        dtype = torch.int8 if style == "int-quantized" else torch.float8_e4m3fn
        assert style == "float-quantized" or inputs is not None
        assert shape(tensors, "weight", dtype, OUT, IN)
        assert tuple(tensors["weight_scale"].shape) == (OUT, 1)
    elif style == "mxfp8-quantized":
        assert shape(tensors, "weight", torch.float8_e4m3fn, OUT, IN)
        assert shape(tensors, "weight_scale", torch.uint8, OUT, IN // 32)
    else:
        assert style in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
        assert shape(tensors, "weight_packed", torch.uint8, OUT, IN // 2)
        assert tuple(tensors["weight_scale"].shape) == (OUT, IN // weights.group_size)
        assert ("weight_global_scale" in tensors) == (style == "nvfp4-pack-quantized")


def torchao(config: Any, tensors: Tensors) -> None:
    library = pytest.importorskip("torchao.core.config")
    assert list(config["quant_type"]) == ["default"]
    made = library.config_from_dict(config["quant_type"]["default"])
    assert type(made).__name__ == config["quant_type"]["default"]["_type"]
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert tensors


CHECKS = {
    "gptq-4": ("gptq", gptq),
    "gptq-8": ("gptq", gptq),
    "awq-4": ("awq", awq),
    "bnb-nf4": ("bitsandbytes", bitsandbytes),
    "bnb-nf4-dq": ("bitsandbytes", bitsandbytes),
    "bnb-int8": ("bitsandbytes", bitsandbytes),
    "fp8-block": ("fp8", fp8),
    "fp8-row": ("fbgemm_fp8", fbgemm),
    "hqq-4": ("hqq", hqq),
    "ct-int4": ("compressed-tensors", compressed),
    "ct-int4-asym": ("compressed-tensors", compressed),
    "ct-int8": ("compressed-tensors", compressed),
    "ct-int8-dynamic": ("compressed-tensors", compressed),
    "ct-fp8": ("compressed-tensors", compressed),
    "ct-fp8-dynamic": ("compressed-tensors", compressed),
    "ct-nvfp4": ("compressed-tensors", compressed),
    "ct-mxfp4": ("compressed-tensors", compressed),
    "ct-mxfp8": ("compressed-tensors", compressed),
    "torchao-int8wo": ("torchao", torchao),
}


@pytest.mark.parametrize("method", sorted(CHECKS))
def test_a_folder_is_what_vllm_asks_for(method: str, source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if method.startswith(("gptq", "awq")):
        generator = torch.Generator().manual_seed(0)
        options["calibration"] = torch.randint(3, 96, (4, 32), generator=generator)
    quantmill.quantize(source, tmp_path / "out", method, **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    prefix = "model.layers.0.mlp.down_proj."
    stored = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    tensors = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    key, check = CHECKS[method]
    assert config["quant_method"] == key
    check(config, tensors)


def test_the_page_names_every_method_that_is_checked_and_no_other_key() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    keys: dict[str, str] = {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 4:
            keys |= dict.fromkeys(re.findall(r"`([\w.-]+)`", cells[0]), cells[1].strip("`"))
    assert {method: key for method, (key, _) in CHECKS.items()}.items() <= keys.items()


def test_what_vllm_does_not_read_is_told_apart(source: Path, tmp_path: Path) -> None:
    """The scale of a whole tensor has another name there; ``ct-fp8`` is for that."""
    quantmill.quantize(source, tmp_path / "out", "fp8-tensor")
    stored = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith(".weight_scale") for name in stored)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("fp8-block", "modules_to_not_convert"),
        ("ct-int4:group_size=32", "ignore"),
        ("bnb-nf4", "llm_int8_skip_modules"),
    ],
)
def test_a_router_is_named_among_what_is_kept(method: str, key: str, tmp_path: Path) -> None:
    """vLLM has a linear layer of its config there, and asks for scales unless it is named."""
    source = testing.write("qwen3-moe", tmp_path / "float")
    quantmill.quantize(source, tmp_path / "out", method)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"} == set(config[key])
    again = quantmill.load(tmp_path / "out")
    assert again.model.layers[0].mlp.gate.weight.dtype == torch.float32
