"""The torchao layouts: peers' checkpoints, round trips, damage."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao

import quantmill
from quantmill.backend import Quantizer
from quantmill.findings import QuantmillError
from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target, write_tiny_llama
from quantmill_torchao.codec import TorchaoCodec
from quantmill_torchao.config import TorchaoConfig
from quantmill_torchao.linear import TorchaoLinear, rounded_inputs
from quantmill_torchao.quantizer import TorchaoQuantizer
from quantmill_torchao.recipes import Inputs
from quantmill_torchao.tensors import to_tensor

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir())
KINDS: dict[str, dict[str, Any]] = {
    "int8-row": {"quant_type": "Int8WeightOnlyConfig"},
    "int8-tensor": {"quant_type": "Int8WeightOnlyConfig", "granularity": "PerTensor"},
    "int8-group": {"quant_type": "Int8WeightOnlyConfig", "granularity": "PerGroup(32)"},
    "int8-dynamic": {"quant_type": "Int8DynamicActivationInt8WeightConfig"},
    "int8-dynamic-asym": {
        "quant_type": "Int8DynamicActivationInt8WeightConfig",
        "act_mapping_type": "ASYMMETRIC",
    },
    "int8-reduced": {
        "quant_type": "Int8DynamicActivationInt8WeightConfig",
        "reduce_range": True,
    },
    "float8-row": {"quant_type": "Float8WeightOnlyConfig"},
    "float8-tensor": {"quant_type": "Float8WeightOnlyConfig", "granularity": "PerTensor"},
    "float8-group": {"quant_type": "Float8WeightOnlyConfig", "granularity": "PerGroup(32)"},
    "float8-e5m2": {"quant_type": "Float8WeightOnlyConfig", "weight_dtype": "float8_e5m2"},
    "float8-dynamic": {
        "quant_type": "Float8DynamicActivationFloat8WeightConfig",
        "granularity": "PerRow",
    },
    "int4": {"quant_type": "Int4WeightOnlyConfig", "group_size": 32},
    "intx-dynamic": {
        "quant_type": "Int8DynamicActivationIntxWeightConfig",
        "weight_dtype": "int4",
    },
    **{
        f"int{bits}-{mapping.lower()}": {
            "quant_type": "IntxWeightOnlyConfig",
            "weight_dtype": f"int{bits}",
            "granularity": "PerGroup(32)" if bits % 2 else "PerAxis(0)",
            "mapping_type": mapping,
        }
        for bits in range(1, 9)
        for mapping in ("SYMMETRIC", "ASYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR")
    },
    "int4-hqq": {
        "quant_type": "IntxWeightOnlyConfig",
        "weight_dtype": "int4",
        "granularity": "PerGroup(32)",
        "intx_choose_qparams_algorithm": "HQQ_SCALE_ONLY",
    },
}


def made(kind: str, weight: Tensor) -> tuple[TorchaoCodec, Any]:
    config = TorchaoConfig.from_user(KINDS[kind])
    quantizer: Quantizer[Any] = TorchaoQuantizer(
        config, device=torch.device("cpu"), kernels=KernelRegistry([])
    )
    rows, columns = weight.shape
    form = quantizer.quantize(make_target(rows, columns), MatrixSource(weight))
    return TorchaoCodec(config), form


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_peers_checkpoints_match(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    expected = load_file(DATA / name / "expected.safetensors")
    model: Any = quantmill.load(DATA / name)
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    # Both compute in bfloat16, in different orders.
    assert (logits - expected["logits"]).norm() < 0.03 * expected["logits"].norm()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_state_dict_is_the_file(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    state = quantmill.load(DATA / name).state_dict()
    stored = load_file(DATA / name / "model.safetensors")
    assert set(state) == set(stored)
    for key, tensor in stored.items():
        assert state[key].dtype == tensor.dtype and torch.equal(raw(state[key]), raw(tensor)), key


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_encoding_is_undone_by_decoding(kind: str) -> None:
    codec, form = made(kind, random(16, 64))
    stored, note = codec.encode(form), codec.annotate(form, "w")["w"]
    target = replace(make_target(16, 64), note=note)
    again: Any = codec.decode(stored, target, torch.bfloat16)
    assert torch.equal(again.dequantize(), form.dequantize())
    assert again.traits() == form.traits() and again.layout == form.layout
    for name, tensor in codec.encode(again).items():
        assert torch.equal(raw(tensor), raw(stored[name])), name
    shapes = {name: tuple(t.shape) for name, t in codec.encode(form.to("meta")).items()}
    assert shapes == {name: tuple(t.shape) for name, t in stored.items()}
    # Without its note the config decides.
    bare = codec.decode(stored, make_target(16, 64), torch.bfloat16)
    assert torch.equal(bare.dequantize(), form.dequantize())


def test_products_with_rounded_inputs_are_torchaos() -> None:
    pytest.importorskip("quantmill_transformers")
    quantization = pytest.importorskip("torchao.quantization")
    for mapping in quantization.MappingType.SYMMETRIC, quantization.MappingType.ASYMMETRIC:
        plain = torch.nn.Linear(96, 40, bias=False)
        plain.weight.data = random(40, 96).float() / 3
        model = torch.nn.Sequential(torch.nn.Sequential(plain))
        config = quantization.Int8DynamicActivationInt8WeightConfig(act_mapping_type=mapping)
        theirs = copy.deepcopy(model)
        quantization.quantize_(theirs, config)
        quantmill.quantize_model(model, config)
        x = random(7, 96, seed=1).float()
        with torch.inference_mode():
            assert torch.equal(model(x), theirs(x))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["int8-row", "int3-asymmetric", "int4-symmetric", "float8-row", "int4"]),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_all_shapes_round_trip(kind: str, rows: int, groups: int, seed: int) -> None:
    codec, form = made(kind, random(rows, 32 * groups, seed))
    target = replace(make_target(rows, 32 * groups), note=codec.annotate(form, "w")["w"])
    again = codec.decode(codec.encode(form), target, torch.bfloat16)
    assert torch.equal(again.dequantize(), form.dequantize())


@pytest.mark.parametrize("kind", [name for name in sorted(KINDS) if name != "int4"])
def test_torchaos_tensor_has_equal_weights(kind: str) -> None:
    """What is written is a tensor of torchao with the same values."""
    codec, form = made(kind, random(16, 64))
    tensors = {f"layer.{name}": item for name, item in codec.encode(form).items()}
    notes = codec.metadata(list(tensors), codec.annotate(form, "layer.weight"))
    assert is_metadata_torchao(dict(notes))
    found, rest = unflatten_tensor_state_dict(tensors, dict(notes))
    assert not rest
    theirs = found["layer.weight"].dequantize()
    # One bit of bfloat16 where torchao multiplies in bfloat16.
    assert (theirs.float() - form.dequantize().float()).abs().max() <= 2**-7 * theirs.abs().max()
    if "int8" in kind or "float8" in kind:
        assert torch.equal(theirs, form.dequantize())


@pytest.mark.parametrize("kind", ["int8-row", "int4-symmetric", "float8-row", "int4-asymmetric"])
def test_no_worse_than_torchaos_own(kind: str) -> None:
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    weight = random(32, 64)
    codec, form = made(kind, weight)
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight.clone()
    quantize_(layer, config_from_dict(codec.config.entry))
    theirs: Any = layer.weight
    ours_off = (form.dequantize(torch.float32) - weight.float()).norm()
    theirs_off = (theirs.dequantize().float() - weight.float()).norm()
    assert ours_off <= theirs_off * 1.001


@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-dynamic-asym", "intx-dynamic"])
def test_8_bit_activations_compute_what_torchao_computes(kind: str) -> None:
    codec, form = made(kind, random(32, 64))
    x = random(5, 64, seed=3)
    module = TorchaoLinear(form, None, codec, KernelRegistry([]))
    theirs = nn.functional.linear(x, to_tensor(form))
    with torch.inference_mode():
        ours = module(x)
    # Its intx weight is rounded to 16 bits, ours is not; the codes of inputs are the same.
    bound = 0.005 if kind == "intx-dynamic" else 1e-4
    assert (ours.float() - theirs.float()).norm() < bound * theirs.float().norm()
    plain = nn.functional.linear(x.float(), form.dequantize(torch.float32))
    assert not torch.equal(ours.float(), plain)


@pytest.mark.parametrize(
    "inputs",
    [
        Inputs("int8"),
        Inputs("int8", symmetric=False),
        Inputs("int8", reduced=True),
        Inputs("float8"),
        Inputs("float8", high=1.0),
    ],
)
def test_rounded_inputs_are_near(inputs: Inputs) -> None:
    x = random(4, 64) * 0.1
    codes, scale, _ = rounded_inputs(x, inputs)
    off = ((codes.float() * scale) - x.float()).norm() / x.float().norm()
    assert 0 < off < (0.03 if inputs.kind == "float8" else 0.015)


def test_a_written_checkpoint_is_torchaos(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "float", bias=True)
    quantmill.quantize(source, tmp_path / "out", "torchao-int8wo", max_shard_bytes=120_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert is_metadata_torchao(metadata)
        tensors.update(load_file(path))
    found, rest = unflatten_tensor_state_dict(tensors, metadata)
    assert not rest
    assert set(found) == set(load_file(source / "model.safetensors"))


BROKEN: dict[str, tuple[str, Any, str]] = {
    "scale of zero": ("_weight_scale", lambda t: t * 0, "QM-TORCHAO-003"),
    "negative scale": ("_weight_scale", lambda t: -t, "QM-TORCHAO-003"),
    "scale of NaN": ("_weight_scale", lambda t: t * float("nan"), "QM-TORCHAO-003"),
    "infinite scale": ("_weight_scale", lambda t: t / 0, "QM-TORCHAO-003"),
    "too few scales": ("_weight_scale", lambda t: t[:-1], "QM-TORCHAO-001"),
    "no scale": ("_weight_scale", lambda t: None, "QM-TORCHAO-001"),
    "scale of integers": ("_weight_scale", lambda t: t.to(torch.int32), "QM-TORCHAO-001"),
    "codes cut": ("_weight_qdata", lambda t: t[:, :-1], "QM-TORCHAO-001"),
    "codes too large": ("_weight_qdata", lambda t: t * 0 + 99, "QM-TORCHAO-001"),
    "zero points cut": ("_weight_zero_point", lambda t: t[:-1], "QM-TORCHAO-001"),
    "no zero points": ("_weight_zero_point", lambda t: None, "QM-TORCHAO-001"),
}


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_damage_is_named(what: str) -> None:
    name, change, code = BROKEN[what]
    codec, form = made("int3-asymmetric", random(16, 64))
    stored, note = codec.encode(form), codec.annotate(form, "w")["w"]
    changed = change(stored.pop(name))
    if changed is not None:
        stored[name] = changed
    with pytest.raises(QuantmillError) as caught:
        codec.decode(stored, replace(make_target(16, 64), note=note), torch.bfloat16)
    (found,) = caught.value.findings
    assert found.code == code and found.where == "layer" and found.cause and found.fix


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda note: "no JSON", "QM-TORCHAO-001"),
        (lambda note: note.replace("IntxUnpackedToInt8Tensor", "MXTensor"), "QM-TORCHAO-002"),
        (lambda note: note.replace('"block_size": [1, 32]', '"block_size": [1, 33]'), "001"),
        (lambda note: note.replace('"int3"', '"int33"'), "QM-TORCHAO-001"),
        (lambda note: note.replace("{", '{"_version": 9, ', 1), "QM-TORCHAO-002"),
        (
            lambda note: note.replace(
                '"activation_quantization": null', '"activation_quantization": "odd"'
            ),
            "QM-TORCHAO-002",
        ),
    ],
)
def test_notes_that_contradict_the_tensors_are_named(change: Any, code: str) -> None:
    codec, form = made("int3-asymmetric", random(16, 64))
    note = change(codec.annotate(form, "w")["w"])
    with pytest.raises(QuantmillError) as caught:
        codec.decode(codec.encode(form), replace(make_target(16, 64), note=note), torch.bfloat16)
    assert caught.value.findings[0].code.endswith(code)
