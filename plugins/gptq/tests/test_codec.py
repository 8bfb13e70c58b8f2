"""The GPTQ layouts: peers' checkpoints, round trips, borrowed zero points, damage."""

from __future__ import annotations

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
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    size=st.sampled_from([8, 24, 32, 64]),
    seed=st.integers(0, 1000),
    ordered=st.booleans(),
    version=st.sampled_from(["gptq", "gptq_v2"]),
)
def test_encoding_is_undone_by_decoding(
    bits: int, rows: int, columns: int, size: int, seed: int, ordered: bool, version: Any
) -> None:
    target = make_target(32 * rows, 32 * columns)
    size = min(size, 32 * columns)
    form = make_form(32 * rows, 32 * columns, bits, size, seed, ordered)
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
        ("qzeros", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t[:-1]),
        ("qzeros", lambda t: t.float()),
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t[:, :-1]),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t.reshape(-1)),
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


def test_two_configs_that_disagree_are_refused(tmp_path: Path) -> None:
    import json
    import shutil

    pytest.importorskip("quantmill_transformers")
    folder = tmp_path / "copy"
    shutil.copytree(DATA / "gptq-8-g64", folder)
    beside = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps({**beside, "bits": 4}))
    codes = [item.code for item in quantmill.plan(folder).findings.errors]
    assert codes == ["QM-GPTQ-010"]
