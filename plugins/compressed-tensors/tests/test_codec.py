"""The layouts: peers' checkpoints, round trips, several groups in one model, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantmill
from quantmill.findings import QuantmillError
from quantmill.forms import Affine, Blocks, Channel, Codes, Flat, Grouping, PerTensor, ScaledFloat
from quantmill.forms import Group as Groups
from quantmill.kernels import KernelRegistry
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target
from quantmill.testing.fabricate import write_tiny_llama
from quantmill_compressed_tensors.codec import CompressedCodec
from quantmill_compressed_tensors.config import CompressedConfig
from quantmill_compressed_tensors.forms import Layout, StoredAffine, StoredFloat
from quantmill_compressed_tensors.inputs import quantize_inputs
from quantmill_compressed_tensors.linear import CompressedLinear
from quantmill_compressed_tensors.schemes import Args
from quantmill_compressed_tensors.words import pack_rows, unpack_rows

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir())


def make_target(rows: int, columns: int) -> Target:
    info = ParameterInfo("layer.weight", (rows, columns), "BF16", ("layer.weight",))
    module = ModuleInfo("layer", "linear", "Linear", {"weight": info})
    return Target(module, "weight", "linear", rows, columns)


def make_codec(**options: Any) -> CompressedCodec:
    return CompressedCodec(CompressedConfig.from_user(options))


def make_packed(
    rows: int, columns: int, bits: int, size: int, seed: int, *, zeros: bool, ordered: bool = False
) -> StoredAffine:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // size
    offset = torch.full((rows, groups), 2 ** (bits - 1))
    index = None
    if zeros:
        offset = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    if ordered:
        index = torch.randint(0, groups, (columns,), generator=generator, dtype=torch.int32)
    return StoredAffine(
        Codes.pack(torch.randint(0, 2**bits, (rows, columns), generator=generator), bits, "dense"),
        torch.rand(rows, groups, generator=generator).to(torch.bfloat16),
        Groups(size),
        offset.to(torch.uint8),
        "zero",
        index,
        dtype=torch.bfloat16,
        layout=Layout(True, (rows, groups), "packed" if zeros else "none"),
    )


def bits(tensor: Tensor) -> Tensor:
    """FP8 as bytes: torch.equal does not take it when both are one tensor."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        tensor.dtype == other[name].dtype and torch.equal(bits(tensor), bits(other[name]))
        for name, tensor in one.items()
    )


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def logits(folder: Path, ids: Tensor, **options: Any) -> Tensor:
    model: Any = quantmill.load(folder, **options)
    with torch.inference_mode():
        result: Tensor = model(input_ids=ids).logits
    return result


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_peers_checkpoints_match(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer computes in bfloat16, so the reference is asked here, in bfloat16 too: a kernel
    that rounds less is further from it than from the truth."""
    pytest.importorskip("quantmill_transformers")
    monkeypatch.setattr(KernelRegistry, "choose", lambda *args, **options: None)
    expected = load_file(DATA / name / "expected.safetensors")
    ids = expected["input_ids"]
    assert off(logits(DATA / name, ids), expected["logits"]) < 0.01
    floats = expected.get("logits_dequantized", expected["logits"])
    assert off(logits(DATA / name, ids, dequantize=True), floats) < 0.004


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_with_kernels_stay_near(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    expected = load_file(DATA / name / "expected.safetensors")
    assert off(logits(DATA / name, expected["input_ids"]), expected["logits"]) < 0.08


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_state_dict_is_the_file(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    state = quantmill.load(DATA / name).state_dict()
    assert equal(dict(state), load_file(DATA / name / "model.safetensors"))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_words_hold_a_stream_of_codes(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    words = pack_rows(Codes.pack(codes, bits, "dense"))
    assert words.shape == (rows, -(-columns * bits // 32)) and words.dtype == torch.int32
    # By the definition, with Python's long integers.
    first = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[0]))
    assert first == sum(int(code) << (bits * i) for i, code in enumerate(codes[0]))
    assert torch.equal(unpack_rows(words, bits, columns).unpack(), codes.to(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    size=st.sampled_from([8, 17, 32, 64]),
    seed=st.integers(0, 1000),
    zeros=st.booleans(),
    ordered=st.booleans(),
)
def test_packed_encoding_is_undone_by_decoding(
    bits: int, rows: int, groups: int, size: int, seed: int, zeros: bool, ordered: bool
) -> None:
    form = make_packed(rows, groups * size, bits, size, seed, zeros=zeros, ordered=ordered)
    codec = make_codec(num_bits=bits, group_size=size, symmetric=not zeros)
    stored = codec.encode(form)
    again = codec.decode(stored, make_target(rows, groups * size), torch.bfloat16)
    assert torch.equal(again.dequantize(), form.dequantize())
    assert equal(codec.encode(again), stored)
    shapes = {name: tuple(t.shape) for name, t in codec.encode(form.to("meta")).items()}
    assert shapes == {name: tuple(t.shape) for name, t in stored.items()}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 40),
    columns=st.sampled_from([32, 64, 96]),
    kind=st.sampled_from(["tensor", "channel", "group", "block"]),
    real=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_bytes_round_trip_with_every_grouping(
    rows: int, columns: int, kind: str, real: bool, zeros: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grouping: Grouping = {
        "tensor": PerTensor(),
        "channel": Channel(0),
        "group": Groups(32),
        "block": Blocks(16, 24),
    }[kind]
    target, options = make_target(rows, columns), {"strategy": kind, "block_structure": [16, 24]}
    if kind != "block":
        del options["block_structure"]
    if kind == "group":
        options["group_size"] = 32  # type: ignore[assignment]
    shape = grouping.scale_shape((rows, columns))
    lies = {0: (1,), 1: (rows, 1)}.get(len(shape), shape)
    scale = torch.rand(shape, generator=generator).to(torch.bfloat16)
    values = torch.randn(rows, columns, generator=generator)
    form: Any
    if real:
        codec = make_codec(type="float", **options)
        form = StoredFloat(
            values.to(torch.float8_e4m3fn), scale, grouping, layout=Layout(scale_shape=lies)
        )
    else:
        codec = make_codec(num_bits=8, format="naive-quantized", symmetric=not zeros, **options)
        offset = torch.randint(-9, 9, shape, generator=generator).to(torch.int8)
        form = StoredAffine(
            Codes((values * 40).clamp(-128, 127).to(torch.int8), 8, (rows, columns), "i8"),
            scale,
            grouping,
            offset if zeros else None,
            "zero" if zeros else "none",
            layout=Layout(False, lies, "plain" if zeros else "none", lies if zeros else None),
        )
    stored = codec.encode(form)
    again = codec.decode(stored, target, torch.float32)
    assert torch.equal(again.dequantize(), form.dequantize(torch.float32))
    assert equal(codec.encode(again), stored)


def test_forms_of_other_layouts_are_encoded() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    codec, target = make_codec(num_bits=4, group_size=32), make_target(16, 64)
    for form in (
        Affine.quantize(weight, 4, Groups(32), symmetric=True),
        Affine.quantize(weight, 4, Groups(32), packing="u8"),
        Affine.quantize(weight, 8, Channel(0), packing="u8"),
        Affine.quantize(weight, 4, PerTensor()),
        ScaledFloat.quantize(weight, torch.float8_e4m3fn, Channel(0)),
        ScaledFloat.quantize(weight, torch.float8_e4m3fn, Groups(32)),
    ):
        again = codec.decode(codec.encode(form), target, torch.float32)
        assert torch.equal(again.dequantize(), form.dequantize(torch.float32))
    for other in (
        Affine.quantize_rows_int8(weight),
        Affine.quantize(weight, 4, Groups(32), offset="minimum"),
        Affine.quantize(weight, 4, Flat(32)),
    ):
        with pytest.raises(QuantmillError, match="anew"):
            codec.encode(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 0.0])
@pytest.mark.parametrize("kind", ["float8", "int8", "packed"])
def test_a_scale_that_no_weight_has_is_named(value: float, kind: str) -> None:
    codec, weight, size = make_codec(type="float"), torch.ones(4, 8).to(torch.float8_e4m3fn), 8
    if kind == "int8":
        codec, weight = make_codec(num_bits=8, dynamic_activations=True), torch.ones(4, 8).char()
    stored = {"weight": weight, "weight_scale": torch.ones(4, 1)}
    if kind == "packed":
        codec, size = make_codec(num_bits=4, group_size=32), 32
        stored = codec.encode(make_packed(4, 32, 4, 32, 0, zeros=False))
    stored["weight_scale"][2] = value
    with pytest.raises(QuantmillError, match=r"QM-CT-004\] layer: weight_scale"):
        codec.decode(stored, make_target(4, size), torch.float32)


def test_a_row_of_zeros_may_have_a_scale_of_zero() -> None:
    stored = make_codec(num_bits=4, group_size=32).encode(make_packed(4, 32, 4, 32, 0, zeros=False))
    stored["weight_packed"][1] = -0x77777778  # every code 8, which stands for zero
    stored["weight_scale"][1] = 0
    form = make_codec(num_bits=4, group_size=32).decode(stored, make_target(4, 32), torch.float32)
    assert not form.dequantize()[1].any()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weight_packed", lambda t: t[:-1]),
        ("weight_packed", lambda t: t[:, :-1]),
        ("weight_packed", lambda t: t.float()),
        ("weight_shape", lambda t: t + 1),
        ("weight_shape", lambda t: t[:1]),
        ("weight_scale", lambda t: t[:-1]),
        ("weight_scale", lambda t: t.to(torch.int32)),
        ("weight_zero_point", lambda t: t[:-1]),
        ("weight_zero_point", lambda t: t.to(torch.int8)),
        ("weight_g_idx", lambda t: t + 9),
        ("weight_g_idx", lambda t: t - 1),
        ("weight_g_idx", lambda t: t[:-1]),
    ],
)
def test_damage_is_named(name: str, damage: Any) -> None:
    codec = make_codec(num_bits=4, group_size=32, symmetric=False)
    stored = codec.encode(make_packed(64, 96, 4, 32, 0, zeros=True, ordered=True))
    with pytest.raises(QuantmillError) as caught:
        codec.decode({**stored, name: damage(stored[name])}, make_target(64, 96), torch.float32)
    assert caught.value.findings[0].code == "QM-CT-001"
    assert "layer" in str(caught.value)


@pytest.mark.parametrize("name", ["weight_packed", "weight_shape", "weight_scale"])
def test_a_missing_tensor_is_named(name: str) -> None:
    codec = make_codec(num_bits=4, group_size=32)
    stored = codec.encode(make_packed(64, 96, 4, 32, 0, zeros=False))
    del stored[name]
    with pytest.raises(QuantmillError, match="layer"):
        codec.decode(stored, make_target(64, 96), torch.float32)


def test_an_order_of_minus_one_is_none_and_is_kept() -> None:
    codec = make_codec(num_bits=4, group_size=32)
    stored = codec.encode(make_packed(64, 96, 4, 32, 0, zeros=False))
    stored["weight_g_idx"] = torch.full((96,), -1, dtype=torch.int32)
    form = codec.decode(stored, make_target(64, 96), torch.float32)
    assert isinstance(form, Affine) and form.group_index is None
    assert equal(codec.encode(form), stored)


def test_the_tensors_outrank_the_config() -> None:
    stored = make_codec(num_bits=4, group_size=32).encode(
        make_packed(64, 96, 4, 32, 0, zeros=False)
    )
    form = make_codec(num_bits=8, group_size=32).decode(stored, make_target(64, 96), torch.float32)
    assert form.traits()["bits"] == 4 and form.traits()["group_size"] == 32


@pytest.mark.parametrize("said", [{"group_size": 48}, {"strategy": "channel"}])
def test_scales_of_another_group_size_than_the_configs_are_refused(said: dict[str, Any]) -> None:
    stored = make_codec(num_bits=4, group_size=32).encode(
        make_packed(64, 96, 4, 32, 0, zeros=False)
    )
    with pytest.raises(QuantmillError, match=r"\[64, 3\] for a weight of \[64, 96\]"):
        make_codec(num_bits=4, **said).decode(stored, make_target(64, 96), torch.float32)


def test_groups_that_differ_by_module_are_written_and_read(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float")
    given = {
        "method": "ct-int4:group_size=32",
        "assign": {"**.down_proj": "ct-fp8", "**.o_proj": "ct:num_bits=8,group_size=64"},
    }
    quantmill.quantize(source, tmp_path / "out", given)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 3
    live, again = quantmill.load(source, given), quantmill.load(tmp_path / "out")
    assert equal(dict(live.state_dict()), dict(again.state_dict()))
    first: Any = again.get_submodule("model.layers.0")
    assert first.mlp.down_proj.form.kind == "scaled_float"
    assert first.self_attn.o_proj.form.traits()["bits"] == 8
    assert first.self_attn.q_proj.form.traits()["bits"] == 4


def test_static_input_scales_are_used_and_kept() -> None:
    codec = make_codec(num_bits=8, dynamic_activations=True)
    values = torch.randint(-128, 128, (16, 32)).to(torch.int8)
    stored = {
        "weight": values,
        "weight_scale": torch.rand(16, 1),
        "input_scale": torch.tensor([0.05]),
    }
    form = codec.decode(stored, make_target(16, 32), torch.float32)
    args = Args(num_bits=8, strategy="tensor")
    module = CompressedLinear(form, None, codec, KernelRegistry([]), "float32", args)
    x = torch.randn(3, 32)
    grid = (x / 0.05).clamp(-128, 127).round() * 0.05
    wanted = grid @ form.dequantize(torch.float32).T
    assert off(module(x), wanted) < 1e-6
    assert equal(dict(module.state_dict()), stored)
    assert module.inputs is args and "inputs=int8, tensor" in repr(module)


@pytest.mark.parametrize(
    "args",
    [
        Args(num_bits=8, strategy="token", dynamic=True),
        Args(num_bits=8, strategy="token", dynamic=True, symmetric=False),
        Args(num_bits=8, strategy="tensor", dynamic=True),
        Args(num_bits=8, strategy="group", group_size=16, dynamic=True),
        Args(type="float", strategy="token", dynamic=True),
    ],
)
def test_dynamic_inputs_stay_near_and_zeros_stay_zeros(args: Args) -> None:
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    rounded = quantize_inputs(x, args)
    assert rounded.shape == x.shape and not rounded[0, 0].any()
    assert 0 < off(rounded, x) < 0.05
    if args.means == "token":
        # A token's result does not depend on what else is in the batch.
        assert torch.equal(quantize_inputs(x[1:, 2:3], args), rounded[1:, 2:3])


@pytest.mark.parametrize("name", ["ct-float8-channel", "ct-int8-channel"])
def test_stored_scales_of_activations_survive_a_kernels_layout(name: str, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    stored = load_file(DATA / name / "model.safetensors")
    for key in [key for key in stored if key.endswith("weight_scale")]:
        stored[key.replace("weight_scale", "input_scale")] = torch.tensor([0.05])
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((DATA / name / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    kind = group["weights"]["type"]
    group["input_activations"] = {"num_bits": 8, "type": kind, "strategy": "tensor"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = quantmill.load(tmp_path)
    with torch.inference_mode():
        model(input_ids=torch.arange(8).reshape(1, 8))
    state = model.state_dict()
    assert all(torch.equal(state[key].float(), tensor.float()) for key, tensor in stored.items())
    assert torch.isfinite(quantmill.load(tmp_path, dequantize=True).lm_head.weight).all()
