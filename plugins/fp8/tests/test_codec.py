"""The FP8 layouts: checkpoints made from the formats' definitions, round trips, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantmill
from quantmill.findings import QuantmillError
from quantmill.forms import PerTensor, ScaledFloat
from quantmill.testing import make_target
from quantmill_fp8.codec import BlockCodec, RowCodec
from quantmill_fp8.config import FbgemmFp8Config, Fp8Config
from quantmill_fp8.form import Fp8Weight

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir())
E8M0 = torch.float8_e8m0fnu


def off(model: Any, expected: dict[str, Tensor]) -> float:
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    return float((logits - expected["logits"]).norm() / expected["logits"].norm())


def block_codec(size: tuple[int, int] | None = (128, 128), **fields: Any) -> BlockCodec:
    return BlockCodec(Fp8Config(weight_block_size=size, **fields))


def stored_blocks(rows: int = 192, columns: int = 160, size: int = 64) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    grid = (-(-rows // size), -(-columns // size))
    return {
        "weight": torch.randn(rows, columns, generator=made).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(grid, generator=made) + 0.5,
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and torch.equal(
            one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)
        )
        for name in one
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_the_expected_ones(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    expected = load_file(DATA / name / "expected.safetensors")
    # The expected ones are of bfloat16 matmuls, whose order of sums depends on the machine.
    assert off(quantmill.load(DATA / name, dequantize=True), expected) < 2e-3
    # Kernels keep float32 where the reference rounds the weight to bfloat16: not nearer than that.
    assert off(quantmill.load(DATA / name), expected) < 0.025


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_those_of_a_plain_loop(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    state = quantmill.load(DATA / name, dequantize=True).state_dict()
    stored, seen = load_file(DATA / name / "model.safetensors"), 0
    for key, weight in stored.items():
        if weight.dtype != torch.float8_e4m3fn:
            continue
        scale, seen = stored.get(key + "_scale_inv"), seen + 1
        size = 128 if scale is not None else 1
        scale = stored[key + "_scale"] if scale is None else scale
        wanted = torch.empty(weight.shape)
        for row in range(weight.shape[0]):
            for column in range(0, weight.shape[1], 128):
                part = weight[row, column : column + 128].float()
                factor = scale[row // size, column // 128 if size > 1 else 0]
                wanted[row, column : column + 128] = part * factor
        assert torch.equal(state[key], wanted.to(torch.bfloat16)), key
    assert seen == 14


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_state_dict_is_the_file(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    stored = load_file(DATA / name / "model.safetensors")
    state = quantmill.load(DATA / name).state_dict()
    assert equal({key: state[key] for key in stored}, stored)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_its_config_round_trips(name: str) -> None:
    raw = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    kind = Fp8Config if raw["quant_method"] == "fp8" else FbgemmFp8Config
    config, findings = kind.from_checkpoint(raw)
    again = config.to_checkpoint()
    assert not findings and {key: again[key] for key in raw} == raw


def test_quantizing_the_float_model_gives_the_bytes_of_the_file(tmp_path: Path) -> None:
    """The checkpoints hold the weights of one float model; embeddings and norms are there."""
    pytest.importorskip("quantmill_transformers")
    stored = load_file(DATA / "fp8-block" / "model.safetensors")
    float_model = quantmill.load(DATA / "fp8-block", dequantize=True).state_dict()
    folder = tmp_path / "float"
    folder.mkdir()
    config = json.loads((DATA / "fp8-block" / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: t.clone() for k, t in float_model.items()}, folder / "model.safetensors")
    quantmill.quantize(folder, tmp_path / "out", "fp8-block")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert set(again) == set(stored)
    for key, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            # bfloat16 between them moved a weight by less than half a step of FP8.
            assert torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8)), key
        elif not key.endswith("_scale_inv"):
            assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("rows", [192, 576])
def test_ragged_blocks_have_their_own_scales(rows: int) -> None:
    """Peers take 192 rows with 2 scales as blocks of 96, and refuse 576 with 5."""
    stored = stored_blocks(rows, 160, 128)
    form = block_codec().decode(stored, make_target(rows, 160), torch.float32)
    weight, scale = stored["weight"].float(), stored["weight_scale_inv"]
    wanted = torch.stack(
        [
            torch.stack([weight[i, j] * scale[i // 128, j // 128] for j in range(160)])
            for i in range(0, rows, 7)
        ]
    )
    assert torch.equal(form.dequantize()[::7], wanted)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, E8M0], ids=str)
def test_scales_of_every_dtype_round_trip(kind: torch.dtype) -> None:
    stored = stored_blocks()
    stored["weight_scale_inv"] = stored["weight_scale_inv"].to(kind)
    codec = block_codec((64, 64))
    form = codec.decode(stored, make_target(192, 160), torch.bfloat16)
    assert equal(codec.encode(form), stored)


def test_bytes_of_powers_of_two_are_read_as_such() -> None:
    stored = stored_blocks(64, 64)
    stored["weight_scale_inv"] = torch.tensor([[129]], dtype=torch.uint8)
    form = block_codec((64, 64)).decode(stored, make_target(64, 64), torch.float32)
    assert torch.equal(form.dequantize(), stored["weight"].float() * 4)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_whole_keeps_its_shape(shape: tuple[int, ...]) -> None:
    stored = {**stored_blocks(), "weight_scale_inv": torch.full(shape, 0.25)}
    codec = block_codec(None)
    form = codec.decode(stored, make_target(192, 160), torch.float32)
    assert isinstance(form, ScaledFloat) and isinstance(form.grouping, PerTensor)
    assert torch.equal(form.dequantize(), stored["weight"].float() * 0.25)
    assert equal(codec.encode(form), stored)


@pytest.mark.parametrize("kernels", [(), ("cpu-matmul-float8",)])
def test_static_activation_scales_survive_loading_and_saving(
    tmp_path: Path, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("quantmill_transformers")
    if kernels:
        pytest.importorskip("quantmill_cpu")
        monkeypatch.setenv("QUANTMILL_DISABLE_KERNELS", ",".join(kernels))
    folder = tmp_path / "static"
    shutil.copytree(DATA / "fp8-block", folder)
    stored = load_file(folder / "model.safetensors")
    scales = [key for key in stored if key.endswith("weight_scale_inv")]
    for number, key in enumerate(scales):
        stored[key.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.01 + number)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "static"
    (folder / "config.json").write_text(json.dumps(config))
    model = quantmill.load(folder)
    with torch.inference_mode():
        model(input_ids=torch.arange(5)[None])
    state = model.state_dict()
    assert equal({key: state[key] for key in stored}, stored)
    model.save_pretrained(tmp_path / "again")
    assert equal(load_file(tmp_path / "again" / "model.safetensors"), stored)


def test_the_bound_of_early_fbgemm_files_is_kept() -> None:
    codec = RowCodec(FbgemmFp8Config())
    stored = {
        "weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(4, 1),
        "input_scale_ub": torch.tensor([1200.0]),
    }
    form = codec.decode(stored, make_target(4, 8), torch.float32)
    assert isinstance(form, Fp8Weight) and equal(codec.encode(form), stored)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (48,), (48, 1)])
def test_scales_say_what_shares_them_where_the_config_does_not(
    name: str, shape: tuple[int, ...]
) -> None:
    # AutoFP8 and vLLM write such files; the config has neither a block size nor the words inverse.
    config, findings = Fp8Config.from_checkpoint(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    )
    made = torch.Generator().manual_seed(0)
    stored = {
        "weight": torch.randn(48, 64, generator=made).to(torch.float8_e4m3fn),
        name: torch.rand(shape, generator=made) + 0.5,
        "input_scale": torch.tensor(0.02),
    }
    codec = BlockCodec(config)
    form = codec.decode(stored, make_target(48, 64), torch.float32)
    scale = stored[name].reshape(-1, 1)
    assert not findings and torch.equal(form.dequantize(), stored["weight"].float() * scale)
    written = codec.encode(form)
    assert equal(written, stored) and written[name].shape == shape


def test_a_block_size_in_the_config_is_a_promise() -> None:
    stored = {**stored_blocks(), "weight_scale_inv": torch.ones(192, 1)}
    with pytest.raises(QuantmillError, match="blocks of 64 x 64"):
        block_codec((64, 64)).decode(stored, make_target(192, 160), torch.float32)
    both = {**stored_blocks(), "weight_scale": torch.ones(3, 3)}
    with pytest.raises(QuantmillError, match="both weight_scale_inv and weight_scale"):
        block_codec((64, 64)).decode(both, make_target(192, 160), torch.float32)


def test_a_plan_says_that_activations_stay_float() -> None:
    plan = quantmill.plan(DATA / "fp8-block")
    assert [item.code for item in plan.findings if item.code.startswith("QM-FP8")] == ["QM-FP8-011"]


W, S = "weight", "weight_scale_inv"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (W, lambda t: t[:-1]),
        (W, lambda t: t.float()),
        (W, lambda t: t.view(torch.uint8)),
        (W, lambda t: t.float().to(torch.float8_e5m2)),
        (S, lambda t: t[:-1]),
        (S, lambda t: t.reshape(-1)),
        (S, lambda t: t.t().contiguous()[:2]),
        (S, lambda t: t[:1, :1]),
        (S, lambda t: t.to(torch.int32)),
    ],
)
def test_damage_is_named(name: str, damage: Any) -> None:
    stored = stored_blocks()
    with pytest.raises(QuantmillError) as caught:
        block_codec((64, 64)).decode(
            {**stored, name: damage(stored[name])}, make_target(192, 160), torch.float32
        )
    (finding,) = caught.value.findings
    assert finding.code == "QM-FP8-001" and finding.where == "layer"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(value: float) -> None:
    stored = stored_blocks()
    stored[S][2, 1] = value
    with pytest.raises(QuantmillError) as caught:
        block_codec((64, 64)).decode(stored, make_target(192, 160), torch.float32)
    (finding,) = caught.value.findings
    assert finding.code == "QM-FP8-002" and "element 7" in finding.cause
    rows = {"weight": stored["weight"], "weight_scale": torch.full((192, 1), value)}
    with pytest.raises(QuantmillError, match="QM-FP8-002"):
        RowCodec(FbgemmFp8Config()).decode(rows, make_target(192, 160), torch.float32)


def test_a_scale_of_zero_is_right_for_zeros() -> None:
    stored = stored_blocks()
    stored[S][2, 1] = 0.0
    stored[W].view(torch.uint8)[128:, 64:128] = 0x80  # minus zero
    form = block_codec((64, 64)).decode(stored, make_target(192, 160), torch.float32)
    assert not form.dequantize()[128:, 64:128].any()


@pytest.mark.parametrize(
    "change",
    [
        {"weight_block_size": [64, 64]},
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"expert_dtype": "fp4"},
        {"modules_to_convert": ["model.embed_tokens"]},
        {"fmt": "e5m2"},
        {"scale_fmt": "double"},
        {"activation_scheme": "sometimes"},
    ],
)
def test_a_config_that_can_not_be_right_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(DATA / "fp8-block", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantmillError):
        quantmill.plan(folder)


def test_the_skip_list_has_another_name_too() -> None:
    config, findings = Fp8Config.from_checkpoint({"ignored_layers": ["a"], "dequantize": False})
    assert config.modules_to_not_convert == ["a"] and not findings


def experts(folder: Path, *, stacked: bool) -> tuple[Path, dict[str, torch.Tensor]]:
    """A mixture whose linears are in FP8, and the weights they stand for by name."""
    testing = pytest.importorskip("quantmill_transformers.testing")
    save = {"save_original_format": not stacked}
    testing.write("deepseek-v3", folder, dtype=torch.bfloat16, save=save)
    stored, meant = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in stored if n.endswith(("_proj.weight", "_proj"))]:
        stored[name] = stored[name].to(torch.float8_e4m3fn)
        *count, rows, columns = stored[name].shape
        scale = torch.rand(*count, -(-rows // 32), -(-columns // 32), generator=generator) + 0.5
        stored[f"{name}_scale_inv"] = scale
        wide = scale.repeat_interleave(32, -2).repeat_interleave(32, -1)[..., :rows, :columns]
        meant[name] = (stored[name].float() * wide).to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, meant


def test_experts_are_read_with_their_scales(tmp_path: Path) -> None:
    folder, meant = experts(tmp_path / "moe", stacked=False)
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in meant
    model = quantmill.load(folder)
    for name, weight in meant.items():
        linear: Any = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(linear.form.dequantize(torch.bfloat16), weight), name
    plain = quantmill.load(folder, dequantize=True).state_dict()
    gate = [meant[f"model.layers.1.mlp.experts.{n}.gate_proj.weight"] for n in range(4)]
    up = [meant[f"model.layers.1.mlp.experts.{n}.up_proj.weight"] for n in range(4)]
    wanted = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)
    assert torch.equal(plain["model.layers.1.mlp.experts.gate_up_proj"], wanted)


@pytest.mark.parametrize("dequantize", [False, True])
def test_stacks_are_never_read_without_their_scales(tmp_path: Path, dequantize: bool) -> None:
    folder, _ = experts(tmp_path / "moe", stacked=True)
    with pytest.raises(QuantmillError) as caught:
        quantmill.load(folder, dequantize=dequantize)
    found = [item for item in caught.value.findings if item.code == "QM-FP8-014"]
    assert found and "experts" in found[0].where


def test_mxfp8_is_fp8_with_powers_of_two_for_32_columns() -> None:
    raw = {"quant_method": "mxfp8", "modules_to_not_convert": ["lm_head"]}
    config, findings = Fp8Config.from_checkpoint(raw)
    assert config.weight_block_size == (1, 32) and config.scale_fmt == "ue8m0" and not findings
    target, codec = make_target(3, 64), BlockCodec(config)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 64, generator=generator).to(torch.float8_e4m3fn)
    powers = torch.randint(120, 130, (3, 2), generator=generator).to(torch.uint8)
    form = codec.decode({"weight": values, "weight_scale_inv": powers}, target, torch.float32)
    wide = 2.0 ** (powers.float() - 127).repeat_interleave(32, dim=1)
    assert torch.equal(form.dequantize(torch.float32), values.float() * wide)
