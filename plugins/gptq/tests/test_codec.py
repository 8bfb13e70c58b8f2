"""The GPTQ layouts: peers' checkpoints, round trips, borrowed zero points, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import quantmill
from quantmill.findings import QuantmillError
from quantmill.forms import Affine, Codes, Group
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target
from quantmill_gptq.codec import GptqCodec
from quantmill_gptq.config import GptqConfig

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir())


def make_target(rows: int, columns: int) -> Target:
    info = ParameterInfo("layer.weight", (rows, columns), "BF16", ("layer.weight",))
    module = ModuleInfo("layer", "linear", "Linear", {"weight": info})
    return Target(module, "weight", "linear", rows, columns)


def make_form(rows: int, columns: int, bits: int, size: int, seed: int, ordered: bool) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    index = None
    if ordered:
        index = torch.randint(0, groups, (columns,), generator=generator, dtype=torch.int32)
    return Affine(
        Codes.pack(codes, bits, "dense"),
        torch.rand(rows, groups, generator=generator).to(torch.float16),
        Group(size),
        torch.randint(0, 2**bits, (rows, groups), generator=generator).to(torch.uint8),
        "zero",
        index,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_peers_checkpoints_match_tightly(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    model: Any = quantmill.load(DATA / name, dtype="float32")
    expected = load_file(DATA / name / "expected.safetensors")
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    error = (logits - expected["logits_fp32"]).norm() / expected["logits_fp32"].norm()
    # The reference is within 1e-6; a native kernel sums in another order.
    assert error < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_state_dict_is_the_file(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    state = quantmill.load(DATA / name).state_dict()
    for key, tensor in load_file(DATA / name / "model.safetensors").items():
        assert torch.equal(state[key], tensor), key


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.sampled_from([24, 32, 50, 128]),
    columns=st.sampled_from([24, 32, 90, 128]),
    size=st.sampled_from([8, 24, 32, 64]),
    seed=st.integers(0, 1000),
    ordered=st.booleans(),
    version=st.sampled_from(["gptq", "gptq_v2"]),
)
def test_encoding_is_undone_by_decoding(
    bits: int, rows: int, columns: int, size: int, seed: int, ordered: bool, version: Any
) -> None:
    target = make_target(rows, columns)
    size = min(size, columns)
    form = make_form(rows, columns, bits, size, seed, ordered)
    codec = GptqCodec(GptqConfig(bits=bits, group_size=size, checkpoint_format=version))  # type: ignore[arg-type]
    stored = codec.encode(form)
    assert {name: t.dtype for name, t in stored.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    again = codec.decode(stored, target, torch.bfloat16)
    assert torch.equal(again.dequantize(), form.dequantize())
    for name, tensor in codec.encode(again).items():
        assert torch.equal(tensor, stored[name]), name
    shapes = {name: tuple(t.shape) for name, t in codec.encode(form.to("meta")).items()}
    assert shapes == {name: tuple(t.shape) for name, t in stored.items()}


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.sampled_from([32, 64, 128]),
    columns=st.sampled_from([32, 96, 128]),
    seed=st.integers(0, 1000),
)
def test_planes_are_put_together_again(bits: int, rows: int, columns: int, seed: int) -> None:
    form = make_form(rows, columns, bits, 32, seed, ordered=False)
    config = GptqConfig(bits=bits, group_size=32, checkpoint_format="gptq_p")  # type: ignore[arg-type]
    stored = GptqCodec(config).encode(form)
    assert stored["qweight"].shape == (columns * bits // 32, rows)
    again = GptqCodec(config).decode(stored, make_target(rows, columns), torch.bfloat16)
    assert torch.equal(again.dequantize(), form.dequantize())


def test_a_block_of_planes_has_its_low_bits_first() -> None:
    """Of 32 codes of 5 bits: four words of their low 4 bits, then one of their highest bits."""
    form = make_form(32, 32, 5, 32, 0, ordered=False)
    codec = GptqCodec(GptqConfig(bits=5, group_size=32, checkpoint_format="gptq_p"))
    words = [int(word) & 0xFFFFFFFF for word in codec.encode(form)["qweight"][:, 0]]
    codes = form.codes.unpack()[0].tolist()
    for index in range(4):
        low = [code & 15 for code in codes[8 * index : 8 * index + 8]]
        assert words[index] == sum(code << (4 * n) for n, code in enumerate(low))
    assert words[4] == sum((code >> 4) << n for n, code in enumerate(codes))


def test_widths_of_planes_choose_their_format() -> None:
    assert GptqConfig.from_user({"bits": 5}).checkpoint_format == "gptq_p"
    mixed = GptqConfig.from_user({"bits": 4, "dynamic": {"+:.*down.*": {"bits": 6}}})
    assert mixed.checkpoint_format == "gptq_p"
    assert GptqConfig.from_user({"bits": 4}).checkpoint_format == "gptq"
    with pytest.raises(QuantmillError, match="gptq_p only"):
        GptqConfig.from_user({"bits": 6, "checkpoint_format": "gptq_v2"})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_zero_borrows_over_the_whole_word(bits: int) -> None:
    """As the peer writes it: minus one on 32 bits, not on each field."""
    form = make_form(32, 32, bits, 32, 0, ordered=False)
    assert isinstance(form.offset, Tensor)
    form.offset.zero_()
    form.offset[1] = 1
    stored = GptqCodec(GptqConfig(bits=bits, group_size=32)).encode(form)  # type: ignore[arg-type]
    per_word = 32 // bits
    ones = sum(1 << (bits * i) for i in range(per_word))
    word = sum(int(z) << (bits * i) for i, z in enumerate(form.offset[:per_word, 0].tolist()))
    assert int(stored["qzeros"][0, 0]) & 0xFFFFFFFF == (word - ones) & 0xFFFFFFFF


def test_three_bit_zero_points_wrap_on_their_field() -> None:
    form = make_form(32, 32, 3, 32, 0, ordered=False)
    assert isinstance(form.offset, Tensor)
    form.offset.zero_()
    stored = GptqCodec(GptqConfig(bits=3, group_size=32)).encode(form)
    fields = Codes(stored["qzeros"].view(torch.uint8).reshape(-1), 3, (32,), "dense").unpack()
    assert fields.tolist() == [7] * 32


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("g_idx", lambda t: t[:-1]),
        ("g_idx", lambda t: t + 100),
        ("g_idx", lambda t: t - 1),
        ("g_idx", lambda t: t.float()),
        ("qzeros", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t[:-1]),
        ("qzeros", lambda t: t.float()),
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t[:, :-1]),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t.reshape(-1)),
        ("scales", lambda t: t.to(torch.int32)),
        ("scales", lambda t: t * float("nan")),
    ],
)
def test_damage_is_named(name: str, damage: Any) -> None:
    codec = GptqCodec(GptqConfig(group_size=32))
    stored = codec.encode(make_form(64, 96, 4, 32, 0, ordered=False))
    with pytest.raises(QuantmillError) as caught:
        codec.decode({**stored, name: damage(stored[name])}, make_target(64, 96), torch.float32)
    assert caught.value.findings[0].code == "QM-GPTQ-001"


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_missing_tensor_is_named(name: str) -> None:
    codec = GptqCodec(GptqConfig(group_size=32))
    stored = codec.encode(make_form(64, 96, 4, 32, 0, ordered=False))
    del stored[name]
    with pytest.raises(QuantmillError, match=name):
        codec.decode(stored, make_target(64, 96), torch.float32)


def _copy(folder: Path, inside: Any, beside: Any) -> Path:
    """A peer's checkpoint with other configs: functions of the one it has."""
    shutil.copytree(DATA / "gptq-8-g64", folder)
    config = json.loads((folder / "config.json").read_text())
    stored = config.pop("quantization_config")
    if inside is not None:
        config["quantization_config"] = inside(stored)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(beside(stored)))
    return folder


@pytest.mark.parametrize(
    ("inside", "beside"),
    [
        (lambda c: c, lambda c: {**c, "bits": 4}),
        (lambda c: c, lambda c: {**c, "group_size": -1}),
        (lambda c: {**c, "dynamic": {"-:.*o_proj": {}}}, lambda c: {**c, "dynamic": {}}),
        (
            lambda c: {k: v for k, v in c.items() if k != "format"},
            lambda c: {"bits": 8, "group_size": 64, "format": "gptq_v2"},
        ),
        (lambda c: c, lambda c: {**c, "bits": "eight"}),
        (lambda c: c, lambda c: [c]),
    ],
    ids=["bits", "group_size", "dynamic", "format", "invalid", "no object"],
)
def test_two_configs_that_disagree_are_refused(inside: Any, beside: Any, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    folder = _copy(tmp_path / "copy", inside, beside)
    found = quantmill.plan(folder).findings.errors
    assert [item.code for item in found] == ["QM-GPTQ-010"]
    assert "quantize_config.json" in found[0].where


@pytest.mark.parametrize("change", [{}, {"bits": 2}, {"group_size": 32}])
def test_a_config_of_other_tensors_is_told_of(change: dict[str, int], tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    folder = _copy(tmp_path / "copy", lambda c: {**c, **change}, lambda c: {**c, **change})
    found = quantmill.plan(folder).findings
    assert [item.code for item in found] == (["QM-GPTQ-011"] if change else [])
    assert not found.errors


@pytest.mark.parametrize("named", [True, False])
def test_a_config_that_lies_beside_alone_is_read(named: bool, tmp_path: Path) -> None:
    """AutoGPTQ's early files: config.json says nothing, and no quant_method anywhere."""
    pytest.importorskip("quantmill_transformers")
    names = ("bits", "group_size", "desc_act", "sym", "quant_method")[: 5 if named else 4]
    folder = _copy(
        tmp_path / "copy", None, lambda c: {"damp_percent": 0.01} | {k: c[k] for k in names}
    )
    expected = load_file(DATA / "gptq-8-g64" / "expected.safetensors")
    model: Any = quantmill.load(folder, dtype="float32")
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    assert (logits - expected["logits_fp32"]).abs().max() < 1e-3
