"""The AWQ layouts: peers' checkpoints, both layouts' round trips, damage."""

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

import quantmill
from quantmill.findings import QuantmillError
from quantmill.forms import Affine, Codes, Group
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target
from quantmill_awq.codec import ORDER, AwqCodec
from quantmill_awq.config import AwqConfig

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir())


def make_target(rows: int, columns: int) -> Target:
    info = ParameterInfo("layer.weight", (rows, columns), "BF16", ("layer.weight",))
    module = ModuleInfo("layer", "linear", "Linear", {"weight": info})
    return Target(module, "weight", "linear", rows, columns)


def make_form(rows: int, columns: int, size: int, seed: int) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // size
    return Affine(
        Codes.pack(torch.randint(0, 16, (rows, columns), generator=generator), 4, "dense"),
        torch.rand(rows, groups, generator=generator).to(torch.float16),
        Group(size),
        torch.randint(0, 16, (rows, groups), generator=generator).to(torch.uint8),
        "zero",
        dtype=torch.float16,
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
    rows=st.integers(1, 12),
    groups=st.integers(1, 9),
    size=st.sampled_from([8, 16, 32, 64, 128]),
    seed=st.integers(0, 1000),
    version=st.sampled_from(["gemm", "gemv"]),
)
def test_encoding_is_undone_by_decoding(
    rows: int, groups: int, size: int, seed: int, version: Any
) -> None:
    form = make_form(8 * rows, groups * size, size, seed)
    codec = AwqCodec(AwqConfig(group_size=size, version=version))
    stored = codec.encode(form)
    target = make_target(8 * rows, groups * size)
    again = codec.decode(stored, target, torch.float16)
    assert torch.equal(again.dequantize(), form.dequantize())
    for name, tensor in codec.encode(again).items():
        assert torch.equal(tensor, stored[name]), name
    shapes = {name: tuple(t.shape) for name, t in codec.encode(form.to("meta")).items()}
    assert shapes == {name: tuple(t.shape) for name, t in stored.items()}


def test_the_tensors_outrank_the_layout_the_config_names() -> None:
    form = make_form(16, 128, 64, 0)
    stored = AwqCodec(AwqConfig(group_size=64, version="gemv")).encode(form)
    other = AwqCodec(AwqConfig(group_size=64, version="gemm"))
    again = other.decode(stored, make_target(16, 128), torch.float16)
    assert torch.equal(again.dequantize(), form.dequantize())


def test_gemv_may_be_padded_otherwise() -> None:
    form = make_form(16, 128, 32, 0)
    codec = AwqCodec(AwqConfig(group_size=32, version="gemv"))
    stored = codec.encode(form)
    wider = {
        "qweight": stored["qweight"],
        "qzeros": torch.nn.functional.pad(stored["qzeros"], (0, 3), value=7),
        "scales": torch.nn.functional.pad(stored["scales"], (0, 24), value=7.0),
    }
    again = codec.decode(wider, make_target(16, 128), torch.float16)
    assert torch.equal(again.dequantize(), form.dequantize())


def _copy(folder: Path, inside: Any, name: str, beside: Any) -> Path:
    """A peer's checkpoint with other configs: functions of the one it has."""
    shutil.copytree(DATA / "awq-4-g64-gemm", folder)
    (folder / "quantize_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    stored = config.pop("quantization_config")
    if inside is not None:
        config["quantization_config"] = inside(stored)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / name).write_text(json.dumps(beside(stored)))
    return folder


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_two_configs_that_disagree_are_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    folder = _copy(tmp_path / "copy", lambda c: c, name, lambda c: {**c, "group_size": 128})
    found = quantmill.plan(folder).findings.errors
    assert [item.code for item in found] == ["QM-AWQ-010"]
    assert found[0].where.startswith(name)


def test_autoawqs_early_config_is_read(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    early = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    folder = _copy(tmp_path / "copy", None, "quant_config.json", lambda _: early)
    expected = load_file(DATA / "awq-4-g64-gemm" / "expected.safetensors")
    model: Any = quantmill.load(folder, dtype="float32")
    with torch.inference_mode():
        logits = model(input_ids=expected["input_ids"]).logits.float()
    assert (logits - expected["logits_fp32"]).abs().max() < 1e-3


@pytest.mark.parametrize("version", ["exllama", "gemv_fast", "llm-awq"])
def test_other_words_for_the_layout(version: str) -> None:
    raw = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": version}
    if version == "exllama":
        assert AwqConfig.from_checkpoint(raw)[0].version == "gemm"
        return
    with pytest.raises(QuantmillError, match="interleaved"):
        AwqConfig.from_checkpoint(raw)


def test_nibbles_of_a_gemm_word_hold_columns_in_their_order() -> None:
    form = make_form(8, 32, 32, 0)
    codes = form.codes.unpack()
    word = int(AwqCodec(AwqConfig(group_size=32)).encode(form)["qweight"][5, 0]) & 0xFFFFFFFF
    assert [(word >> (4 * i)) & 15 for i in range(8)] == [int(codes[c, 5]) for c in ORDER]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t.float()),
        ("qzeros", lambda t: t[:, :-1]),
        ("scales", lambda t: t[:, :-1]),
        ("scales", lambda t: t.to(torch.int32)),
        ("scales", lambda t: t * float("nan")),
    ],
)
def test_damage_is_named(name: str, damage: Any) -> None:
    codec = AwqCodec(AwqConfig(group_size=32))
    stored = codec.encode(make_form(64, 96, 32, 0))
    with pytest.raises(QuantmillError) as caught:
        codec.decode({**stored, name: damage(stored[name])}, make_target(64, 96), torch.float32)
    assert caught.value.findings[0].code == "QM-AWQ-001"
