"""The HQQ layout: a peer's checkpoint, round trips, damage, configs of transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import quantmill
from quantmill.findings import FindingsError, QuantmillError
from quantmill.forms import Affine, Codes
from quantmill.testing.base import make_target
from quantmill.testing.fabricate import write_tiny_llama
from quantmill_hqq.codec import HqqCodec
from quantmill_hqq.config import HqqConfig
from quantmill_hqq.forms import Settings, StoredAffine, grouping_of
from quantmill_hqq.packing import fits, pack, unpack

DATA = Path(__file__).parent / "data"
CHECKPOINTS = sorted(path.name for path in DATA.iterdir())


def make_form(rows: int, columns: int, bits: int, size: int, axis: int, seed: int = 0) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    grouping = grouping_of(size, axis, columns)
    groups = grouping.scale_shape((rows, columns))
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    scale = torch.rand(groups, generator=generator) + 0.01
    zero = torch.randn(groups, generator=generator)
    return Affine(
        Codes.pack(codes, bits, "dense"),
        scale.to(torch.bfloat16),
        grouping,
        zero.to(torch.bfloat16),
        "zero",
        dtype=torch.bfloat16,
    )


def by_hand(stored: dict[str, Tensor], prefix: str) -> Tensor:
    """A 4-bit weight as the peer computes it, in bfloat16 throughout."""
    words = stored[f"{prefix}.W_q"]
    codes = torch.cat([words >> 4, words & 15]).to(torch.bfloat16)
    value = (codes - stored[f"{prefix}.zero"]) * stored[f"{prefix}.scale"]
    return value.reshape(stored[f"{prefix}.shape"].tolist())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_of_peers_checkpoints_match(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    expected = load_file(DATA / name / "expected.safetensors")
    stored = load_file(DATA / name / "model.safetensors")

    def off(model: Any) -> float:
        with torch.inference_mode():
            logits = model(input_ids=expected["input_ids"]).logits.float()
        return float((logits - expected["logits"]).norm() / expected["logits"].norm())

    # The peer rounds three times per weight to bfloat16, we once: with its arithmetic the logits
    # are its own.
    assert off(quantmill.load(DATA / name)) < 0.025
    model: Any = quantmill.load(DATA / name, dequantize=True)
    for prefix in [key.removesuffix(".W_q") for key in stored if key.endswith(".W_q")]:
        weight = model.get_submodule(prefix).weight
        theirs = by_hand(stored, prefix)
        assert torch.allclose(weight.float(), theirs.float(), rtol=0.02, atol=2e-3), prefix
        weight.data = theirs
    assert off(model) < 5e-3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_state_dict_is_the_file(name: str) -> None:
    pytest.importorskip("quantmill_transformers")
    state = quantmill.load(DATA / name).state_dict()
    stored = load_file(DATA / name / "model.safetensors")
    assert set(state) == set(stored)
    for key, tensor in stored.items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key


def test_asking_for_what_a_file_holds_is_no_contradiction() -> None:
    pytest.importorskip("quantmill_transformers")
    plan = quantmill.plan(DATA / CHECKPOINTS[0], "hqq-4")
    assert not plan.findings.errors
    with pytest.raises(FindingsError, match="nbits"):
        quantmill.plan(DATA / CHECKPOINTS[0], "hqq-8")


def test_a_damaged_package_is_refused(tmp_path: Path) -> None:
    shutil.copy(DATA / CHECKPOINTS[0] / "config.json", tmp_path)
    (tmp_path / "qmodel.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(QuantmillError, match="zip"):
        quantmill.plan(tmp_path, "hqq-4")
    # Another safetensors file beside it makes no checkpoint of it.
    shutil.copy(DATA / CHECKPOINTS[0] / "expected.safetensors", tmp_path)
    with pytest.raises(QuantmillError) as caught:
        quantmill.plan(tmp_path)
    assert caught.value.findings[0].code == "QM-HQQ-003"


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_packing_is_undone(bits: int, rows: int, columns: int, seed: int) -> None:
    if not fits(rows, bits):
        rows *= 8
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert torch.equal(unpack(words, bits, rows), codes)


def test_where_each_code_lies() -> None:
    codes = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    assert pack(codes, 4).flatten().tolist() == [0x04, 0x15, 0x26, 0x37]
    assert pack(codes & 3, 2).flatten().tolist() == [0b00_10_00_10, 0b01_11_01_11]
    assert pack(codes & 1, 1).flatten().tolist() == [0b01010101]
    assert pack(codes, 3).tolist() == [[int("0123456700", 8)]]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    rows=st.integers(1, 6),
    columns=st.integers(1, 12),
    size=st.sampled_from([8, 16, 64]),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 1000),
)
def test_encoding_is_undone_by_decoding(
    bits: int, rows: int, columns: int, size: int, axis: int, seed: int
) -> None:
    rows *= 64
    assume(fits(rows * columns // size if axis == 1 else size, bits))
    form = make_form(rows, columns, bits, size, axis, seed)
    codec = HqqCodec(HqqConfig(nbits=bits, group_size=size, axis=axis))  # type: ignore[arg-type]
    stored = codec.encode(form)
    again = codec.decode(stored, make_target(rows, columns), torch.bfloat16)
    assert torch.equal(again.dequantize(), form.dequantize())
    assert again.traits() == form.traits()
    assert all(torch.equal(t, stored[n]) for n, t in codec.encode(again).items())
    shapes = {name: tuple(t.shape) for name, t in codec.encode(form.to("meta")).items()}
    assert shapes == {name: tuple(t.shape) for name, t in stored.items()}


@pytest.mark.parametrize("view", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "said"), [(1, None), (2, 1.58), (3, None), (8, 5), (8, 6)])
def test_other_settings_are_read_and_written_back(
    bits: int, said: float | None, view: torch.dtype | None
) -> None:
    plain = make_form(64, 64, bits, 64, 1)
    codec = HqqCodec(HqqConfig())
    settings = Settings(optimize=False, offload_meta=True, view=view, nbits=said)
    fields = {item.name: getattr(plain, item.name) for item in dataclasses.fields(plain)}
    stored = codec.encode(StoredAffine(**fields, settings=settings))
    assert stored["W_q"].dtype == (view or (torch.int32 if bits == 3 else torch.uint8))
    assert float(stored["nbits"]) == pytest.approx(said or bits)
    again: Any = codec.decode(stored, make_target(64, 64), torch.bfloat16)
    assert again.settings == settings
    assert torch.equal(again.dequantize(), plain.dequantize())
    written = codec.encode(again)
    assert all(bytes_of(written[name]) == bytes_of(tensor) for name, tensor in stored.items())


def bytes_of(tensor: Tensor) -> bytes:
    # Codes seen as floats may be NaN, which equals nothing.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("stored", "bits"), [(5, 8), (6, 8), (1.58, 2), (4, 4)])
def test_bits_of_a_config_that_lie_in_wider_words(stored: float, bits: int) -> None:
    raw = HqqConfig().to_checkpoint()
    raw["quant_config"]["weight_quant_params"] |= {"nbits": stored, "view_as_float": True}
    config, findings = HqqConfig.from_checkpoint(raw)
    assert config.nbits == bits and not findings


@pytest.mark.parametrize(
    ("name", "damage", "code"),
    [
        ("W_q", lambda t: t[:-1], "001"),
        ("W_q", lambda t: t[:, :-1], "001"),
        ("W_q", lambda t: t.float(), "001"),
        ("W_q", lambda t: t.to(torch.int32), "001"),
        ("scale", lambda t: t[:-1], "001"),
        ("scale", lambda t: -t, "001"),
        ("scale", lambda t: t * 0, "001"),
        ("scale", lambda t: t * float("nan"), "001"),
        ("scale", lambda t: t.flatten(), "001"),
        ("zero", lambda t: t.float(), "001"),
        ("zero", lambda t: t[:-1], "001"),
        ("zero", lambda t: t / 0, "001"),
        ("nbits", lambda t: t + 1, "001"),
        ("group_size", lambda t: t * 2, "001"),
        ("axis", lambda t: 1 - t, "001"),
        ("shape", lambda t: t.flip(0), "001"),
        ("packing", lambda t: t[:-1], "001"),
        ("unpack_view_dtype", lambda t: t[1:], "001"),
        ("quant_scale", lambda t: t + 1, "002"),
        ("quant_zero", lambda t: t + 1, "002"),
        ("view_as_float", lambda t: t + 1, "001"),
        ("channel_wise", lambda t: t * 0, "002"),
    ],
)
def test_damage_is_named(name: str, damage: Any, code: str) -> None:
    codec = HqqCodec(HqqConfig())
    stored = codec.encode(make_form(64, 96, 4, 64, 1))
    with pytest.raises(QuantmillError) as caught:
        codec.decode({**stored, name: damage(stored[name])}, make_target(64, 96), torch.float32)
    assert caught.value.findings[0].code == f"QM-HQQ-{code}"
    assert caught.value.findings[0].where == "layer"


def test_transformers_config_is_read_and_written() -> None:
    stored = {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": {
                "nbits": 3,
                "channel_wise": True,
                "group_size": 32,
                "optimize": True,
                "round_zero": False,
                "axis": 0,
                "view_as_float": False,
            },
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": ["lm_head"],
    }
    config, findings = HqqConfig.from_checkpoint(stored)
    assert not findings
    assert (config.nbits, config.group_size, config.axis) == (3, 32, 0)
    assert config.to_checkpoint() == stored


def test_quantized_scales_are_refused() -> None:
    stored = HqqConfig().to_checkpoint()
    stored["quant_config"]["scale_quant_params"] = {"nbits": 8}
    with pytest.raises(FindingsError, match="quant_scale"):
        HqqConfig.from_checkpoint(stored)


def test_dynamic_config_names_what_is_quantized(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    source = write_tiny_llama(tmp_path / "float")
    dynamic = {"self_attn.q_proj": {"nbits": 4}, "mlp.down_proj": {"nbits": 2, "group_size": 32}}
    quantmill.quantize(source, tmp_path / "out", {"method": "hqq", "dynamic_config": dynamic})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    found = {
        key.removeprefix("model.layers.0.").removesuffix(".nbits"): int(tensor)
        for key, tensor in stored.items()
        if key.startswith("model.layers.0.") and key.endswith(".nbits")
    }
    assert found == {"self_attn.q_proj": 4, "mlp.down_proj": 2}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["quant_config"]) == set(dynamic)
    plan = quantmill.plan(tmp_path / "out")
    assert not plan.findings.errors
    assert sum(item.action == "quantize" for item in plan.modules) == 4


def test_skipped_modules_stay_float(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "float")
    plan = quantmill.plan(source, 'hqq-4:skip_modules=["self_attn.q_proj"]')
    kept = {item.name for item in plan.modules if item.action == "keep"}
    assert {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)} <= kept
