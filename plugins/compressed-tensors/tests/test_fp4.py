"""4-bit floats: bits in their places, checkpoints made by hand, round trips, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill.kernels import KernelRegistry
from quantmill.rounding import nearest_e2m1
from quantmill.testing import MatrixSource, make_target, write_tiny_llama
from quantmill_compressed_tensors.codec import CompressedCodec
from quantmill_compressed_tensors.config import CompressedConfig
from quantmill_compressed_tensors.fp4 import STYLES, StoredFp4
from quantmill_compressed_tensors.inputs import quantize_inputs
from quantmill_compressed_tensors.native import Mxfp4Codec, Mxfp4Config, Nvfp4Codec, Nvfp4Config
from quantmill_compressed_tensors.quantizer import CompressedQuantizer
from quantmill_compressed_tensors.schemes import Args

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
"""OCP Microscaling Formats 1.0, table 5: sign, two bits of exponent, one of mantissa."""
NATIVE: dict[str, tuple[Any, Any]] = {
    "mxfp4": (Mxfp4Codec, Mxfp4Config()),
    "nvfp4": (Nvfp4Codec, Nvfp4Config()),
}


def parts(style: str, rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a style."""
    generator = torch.Generator().manual_seed(seed)
    known = STYLES[style]
    groups = columns // known.group
    size = (rows, groups, known.group // 2) if known.blocked else (rows, columns // 2)
    stored = {known.codes: torch.randint(0, 256, size, generator=generator).to(torch.uint8)}
    if known.whole:
        scale = torch.rand(rows, groups, generator=generator) + 0.1
        stored[known.scale] = scale.to(torch.float8_e4m3fn)
        stored[known.whole] = torch.full((1,) if known.inverse else (), 0.5)
        stored[known.inputs] = torch.full((1,) if known.inverse else (), 0.25)
    else:
        scale = torch.randint(100, 140, (rows, groups), generator=generator)
        stored[known.scale] = scale.to(torch.uint8)
    return stored


def by_hand(style: str, stored: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """The weight, number by number."""
    known = STYLES[style]
    packed = stored[known.codes].reshape(rows, columns // 2)
    scale = stored[known.scale]
    out = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            byte = int(packed[row, column // 2])
            value = VALUES[byte >> 4 if column % 2 else byte & 15]
            group = scale[row, column // known.group]
            if known.whole:
                whole = float(stored[known.whole])
                factor = float(group.float()) * (1 / whole if known.inverse else whole)
            else:
                factor = 2.0 ** (int(group) - 127)
            out[row, column] = value * factor
    return out


def codec_of(style: str) -> Any:
    if style in NATIVE:
        made, config = NATIVE[style]
        return made(config)
    name = "NVFP4A16" if style.startswith("nv") else "MXFP4A16"
    return CompressedCodec(CompressedConfig.from_user({"config_groups": {name: ["Linear"]}}))


@pytest.mark.parametrize("style", sorted(STYLES))
def test_values_are_those_of_the_format(style: str) -> None:
    codec, stored = codec_of(style), parts(style, 3, 64)
    form = codec.decode(stored, make_target(3, 64), torch.bfloat16)
    assert torch.equal(form.dequantize(torch.float32), by_hand(style, stored, 3, 64))
    again = codec.encode(form)
    assert set(again) == set(stored)
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype
        left, right = (t.reshape(-1).view(torch.uint8) for t in (again[name], tensor))
        assert torch.equal(left, right), name


@pytest.mark.parametrize("style", ["mxfp4", "nvfp4"])
def test_native_forms_go_into_compressed_tensors(style: str) -> None:
    codec, stored = codec_of(style), parts(style, 4, 64)
    form = codec.decode(stored, make_target(4, 64), torch.bfloat16)
    fit = CompressedCodec.fit(form, make_target(4, 64), {})
    other = CompressedCodec(CompressedConfig.from_user(dict(fit.options)))
    again = other.decode(other.encode(fit.form), make_target(4, 64), torch.bfloat16)
    assert torch.equal(again.dequantize(torch.float32), form.dequantize(torch.float32))


def test_a_reciprocal_that_is_not_exact_is_no_conversion() -> None:
    stored = parts("nvfp4", 4, 64)
    for thousandths in range(300, 400):
        whole = torch.tensor(thousandths / 1000)
        if float(whole.reciprocal().reciprocal()) != float(whole):
            break
    stored["weight_scale_2"] = whole
    form = codec_of("nvfp4").decode(stored, make_target(4, 64), torch.bfloat16)
    with pytest.raises(QuantmillError) as caught:
        CompressedCodec.fit(form, make_target(4, 64), {})
    assert "reciprocal" in caught.value.findings[0].cause


def test_rounding_is_to_nearest_with_ties_to_even() -> None:
    table = torch.tensor(VALUES)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert table[nearest_e2m1(ties).long()].tolist() == wanted
    assert table[nearest_e2m1(-ties).long()].tolist() == [-value for value in wanted]
    assert nearest_e2m1(torch.tensor([-0.1, 0.1])).tolist() == [8, 0]
    x = torch.linspace(-7, 7, 1001)
    off = (table[nearest_e2m1(x).long()] - x).abs()
    assert torch.equal(off, (table[:, None] - x).abs().amin(dim=0))


@pytest.mark.parametrize(("name", "most"), [("NVFP4A16", 0.11), ("MXFP4A16", 0.14)])
def test_quantized_weights_are_near(name: str, most: float) -> None:
    config = CompressedConfig.from_user({"config_groups": {name: ["Linear"]}})
    quantizer = CompressedQuantizer(config, device=torch.device("cpu"), kernels=KernelRegistry([]))
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    weight[3] = 0
    form = quantizer.quantize(make_target(24, 96), MatrixSource(weight))
    assert isinstance(form, StoredFp4)
    off = (form.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm()
    assert 0.05 < off < most
    assert not form.dequantize()[3].any()


def fabricate(source: Path, folder: Path, style: str) -> dict[str, Tensor]:
    """Turn the projections of a float checkpoint into 4-bit floats; the weights they mean."""
    known, table = STYLES[style], torch.tensor(VALUES)
    folder.mkdir()
    tensors, weights = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        tiles = tensor.float().reshape(rows, -1, known.group)
        absmax = tiles.abs().amax(dim=2)
        if known.whole:
            whole = absmax.max() / (448 * 6)
            stored = (absmax / 6 / whole).to(torch.float8_e4m3fn)
            scale = stored.float() * whole
        else:
            exponent = torch.floor(torch.log2(absmax)) - 2
            stored, scale = (exponent + 127).to(torch.uint8), 2.0**exponent
        far = (tiles / scale[:, :, None])[..., None] - table
        codes = far.abs().argmin(dim=3)
        weights[name] = (table[codes] * scale[:, :, None]).reshape(rows, columns)
        pairs = codes.reshape(rows, -1, known.group // 2, 2).to(torch.uint8)
        packed = pairs[..., 0] | pairs[..., 1] << 4
        prefix = name.removesuffix("weight")
        lies = packed if known.blocked else packed.reshape(rows, -1)
        tensors[prefix + known.codes] = lies.contiguous()
        tensors[prefix + known.scale] = stored
        if known.whole:
            tensors[prefix + known.whole] = whole
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": style}
    if style == "nvfp4":
        config["quantization_config"] |= {"quant_algo": "NVFP4", "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("style", ["mxfp4", "nvfp4"])
def test_a_fabricated_checkpoint_loads_with_the_weights_it_means(
    style: str, tmp_path: Path
) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float")
    weights = fabricate(source, tmp_path / "quantized", style)
    plan = quantmill.plan(tmp_path / "quantized")
    assert sum(item.action == "quantize" for item in plan.modules) == 14
    assert not plan.findings.errors
    model: Any = quantmill.load(tmp_path / "quantized", dequantize=True, dtype="float32")
    for name, wanted in weights.items():
        assert torch.equal(model.get_parameter(name), wanted), name
    packed: Any = quantmill.load(tmp_path / "quantized", dtype="float32")
    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        theirs, ours = model(input_ids=ids).logits, packed(input_ids=ids).logits
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("style", ["mxfp4", "nvfp4"])
def test_native_formats_are_not_made(style: str, tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "float")
    with pytest.raises(FindingsError):
        quantmill.quantize(source, tmp_path / "out", style)
    assert not (tmp_path / "out").exists()


BROKEN: dict[str, tuple[str, Any, str]] = {
    "a scale of NaN": ("weight_scale", lambda t: (t.float() * float("nan")).to(t.dtype), "021"),
    "a negative scale": ("weight_scale", lambda t: (-t.float()).to(t.dtype), "021"),
    "no scale": ("weight_scale", lambda t: None, "020"),
    "too few scales": ("weight_scale", lambda t: t[:, :-1].contiguous(), "020"),
    "a whole scale of zero": ("weight_global_scale", lambda t: t * 0, "021"),
    "an infinite whole scale": ("weight_global_scale", lambda t: t / 0, "021"),
    "no whole scale": ("weight_global_scale", lambda t: None, "020"),
    "codes cut": ("weight_packed", lambda t: t[:, :-1].contiguous(), "020"),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_damage_is_named(what: str) -> None:
    name, change, code = BROKEN[what]
    stored = parts("nvfp4-pack-quantized", 4, 64)
    changed = change(stored.pop(name))
    if changed is not None:
        stored[name] = changed
    with pytest.raises(QuantmillError) as caught:
        codec_of("nvfp4-pack-quantized").decode(stored, make_target(4, 64), torch.bfloat16)
    (found,) = caught.value.findings
    assert found.code == f"QM-CT-{code}" and found.where == "layer" and found.fix


def test_an_exponent_of_nan_is_named() -> None:
    stored = parts("mxfp4", 4, 64)
    stored["weight_scales"][1, 1] = 255
    with pytest.raises(QuantmillError) as caught:
        codec_of("mxfp4").decode(stored, make_target(4, 64), torch.bfloat16)
    assert caught.value.findings[0].code == "QM-CT-021"


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "mxfp8"])
def test_inputs_are_rounded_as_the_library_rounds_them(kind: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    fields: dict[str, Any] = {"num_bits": 8 if kind == "mxfp8" else 4, "type": "float"}
    if kind == "nvfp4":
        fields |= {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
        fields |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    else:
        fields |= {"strategy": "group", "group_size": 32, "dynamic": True}
        fields |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[0, 0, 32:] = 0
    whole = torch.tensor([800.0]) if kind == "nvfp4" else None
    theirs = quantization.QuantizationArgs(**fields)
    scale, zero = compute_dynamic_scales_and_zp(x, theirs, nn.Module(), whole)
    wanted = fake_quantize(x.clone(), scale, zero, theirs, global_scale=whole)
    given = {} if whole is None else {"inputs": whole}
    rounded = quantize_inputs(x, Args(**fields), given)
    # A tie of the library's arithmetic in 16 bits may fall to the other side.
    assert (rounded != wanted).float().mean() < 0.01
    assert (rounded.float() - wanted.float()).norm() < 0.02 * wanted.float().norm()
