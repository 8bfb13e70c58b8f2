"""The codecs undo themselves bit for bit, and damaged tensors are a finding."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError
from quantmill.testing import make_target
from quantmill_bnb.codec import Int8Codec

Tensors = dict[str, Tensor]
STORAGES = ["uint8", "int8", "float16", "bfloat16", "float32"]
SHAPES = [(1, 1), (1, 2), (3, 5), (7, 65), (33, 96), (64, 128), (130, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOB = "weight.quant_state.bitsandbytes__nf4"


def headers_of(tensors: Tensors) -> dict[str, TensorHeader]:
    return {
        name: TensorHeader(name, code_of(t.dtype), tuple(t.shape), "f", 0, t.nbytes)
        for name, t in tensors.items()
    }


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        (t.dtype, t.shape) == (other[name].dtype, other[name].shape)
        and torch.equal(t.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name, t in one.items()
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_come_back_bit_for_bit(bench: Any, kind: str, nested: bool, storage: str) -> None:
    made = bench(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
    )
    for shape in SHAPES:
        for dtype in DTYPES:
            form = made.form(shape, dtype)
            stored = made.codec.encode(form)
            width = getattr(torch, storage).itemsize
            assert stored["weight"].dtype == getattr(torch, storage)
            assert stored["weight"].shape == (-(-((shape[0] * shape[1] + 1) // 2) // width), 1)
            again = made.codec.decode(stored, make_target(*shape), torch.bfloat16)
            assert again.shape == shape and again.dtype == dtype
            assert same(again.tensors(), form.tensors()), (shape, dtype)
            assert same(made.codec.encode(again), stored), (shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_comes_back_bit_for_bit(bench: Any, shape: tuple[int, int]) -> None:
    made = bench(load_in_8bit=True)
    form = made.form(shape)
    stored = made.codec.encode(form)
    again = made.codec.decode(stored, make_target(*shape), torch.bfloat16)
    assert same(again.tensors(), form.tensors())
    assert same(made.codec.encode(again), stored)


def test_the_state_of_a_peer_that_unpacked_its_weights_is_kept(bench: Any) -> None:
    # After a forward on a CPU, bitsandbytes quantizes bfloat16 scales anew, and says so.
    made = bench(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stored = made.codec.encode(made.form((64, 128)))
    state = json.loads(bytes(stored[BLOB].tolist()))
    stored[BLOB] = text({**state, "nested_dtype": "bfloat16"})
    again = made.codec.decode(stored, make_target(64, 128), torch.bfloat16)
    assert same(made.codec.encode(again), stored)
    assert same(dict(made.linear(again).state_dict()), stored)


def test_an_int8_weight_without_a_format_is_row_major(bench: Any) -> None:
    made = bench(load_in_8bit=True)
    form = made.form((6, 64))
    stored = made.codec.encode(form)
    del stored["weight_format"]
    again = made.codec.decode(stored, make_target(6, 64), torch.bfloat16)
    assert torch.equal(again.dequantize(), form.dequantize())


def test_a_transposed_linear_is_stored_as_a_linear(bench: Any) -> None:
    target = dataclasses.replace(make_target(64, 192), kind="conv1d", transposed=True)
    for fields in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        made = bench(**fields)
        stored = made.codec.encode(made.form((192, 64)))
        assert made.codec.decode(stored, target, torch.bfloat16).shape == (192, 64)


def text(state: Any) -> Tensor:
    data = state if isinstance(state, bytes) else json.dumps(state).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


def stated(**changes: Any) -> Callable[[Tensors], Tensors]:
    """The quant_state with some entries changed, or (None) without them."""

    def damage(tensors: Tensors) -> Tensors:
        state = {**json.loads(bytes(tensors[BLOB].tolist())), **changes}
        return {**tensors, BLOB: text({k: v for k, v in state.items() if v is not None})}

    return damage


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def drop(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def blob(value: Any) -> Callable[[Tensors], Tensors]:
    return put(BLOB, lambda _: value if isinstance(value, Tensor) else text(value))


NAN = float("nan")
DAMAGE_4BIT: dict[str, Callable[[Tensors], Tensors]] = {
    "no weight": drop("weight"),
    "weight too short": put("weight", lambda t: t[:-1]),
    "weight too long": put("weight", lambda t: torch.cat([t, t])),
    "weight empty": put("weight", lambda t: t[:0]),
    "weight of another dtype": put("weight", lambda t: t.to(torch.int64)),
    "no absmax": drop("weight.absmax"),
    "absmax too short": put("weight.absmax", lambda t: t[:-1]),
    "absmax too long": put("weight.absmax", lambda t: torch.cat([t, t])),
    "absmax of another dtype": put("weight.absmax", lambda t: t.to(torch.int32)),
    "no quant_map": drop("weight.quant_map"),
    "quant_map too short": put("weight.quant_map", lambda t: t[:8]),
    "quant_map of another dtype": put("weight.quant_map", lambda t: t.to(torch.int8)),
    "quant_map of another kind": put("weight.quant_map", lambda t: t.flip(0)),
    "quant_map with NaN": put("weight.quant_map", lambda t: t * NAN),
    "no quant_state": drop(BLOB),
    "two quant_states": lambda t: {**t, BLOB.replace("nf4", "fp4"): t[BLOB]},
    "state of the other kind": lambda t: {
        **drop(BLOB)(t),
        BLOB.replace("nf4", "fp4"): t[BLOB],
    },
    "both layouts": lambda t: {**t, "SCB": torch.ones(64)},
    "state empty": blob(b""),
    "state cut": put(BLOB, lambda t: t[:-5]),
    "state no text": put(BLOB, lambda t: t + 128),
    "state no object": blob([1, 2]),
    "state deeply nested": blob(b"[" * 100_000),
    "state a number": blob(torch.tensor(10**12)),
    "state floats": put(BLOB, lambda t: t.to(torch.float32)),
    "state two-dimensional": put(BLOB, lambda t: t.reshape(1, -1)),
    "no quant_type": stated(quant_type=None),
    "no shape": stated(shape=None),
    "shape of something else": stated(shape=[128, 64]),
    "shape flat": stated(shape=[64 * 128]),
    "shape of three": stated(shape=[64, 128, 1]),
    "shape negative": stated(shape=[-64, -128]),
    "shape of text": stated(shape=["64", "128"]),
    "shape a text": stated(shape="64, 128"),
    "shape infinite": stated(shape=[float("inf"), 128]),
    "no blocksize": stated(blocksize=None),
    "blocksize zero": stated(blocksize=0),
    "blocksize odd": stated(blocksize=63),
    "blocksize another": stated(blocksize=128),
    "blocksize text": stated(blocksize="64"),
    "no dtype": stated(dtype=None),
    "dtype unknown": stated(dtype="bfloat17"),
    "dtype a function": stated(dtype="zeros"),
    "dtype an integer": stated(dtype="int8"),
    "dtype a number": stated(dtype=16),
}
DAMAGE_NESTED: dict[str, Callable[[Tensors], Tensors]] = {
    "no nested_absmax": drop("weight.nested_absmax"),
    "nested_absmax too long": put("weight.nested_absmax", lambda t: torch.cat([t, t])),
    "nested_absmax empty": put("weight.nested_absmax", lambda t: t[:0]),
    "nested_absmax of another dtype": put("weight.nested_absmax", lambda t: t.to(torch.int32)),
    "no nested_quant_map": drop("weight.nested_quant_map"),
    "nested_quant_map too short": put("weight.nested_quant_map", lambda t: t[:255]),
    "nested_quant_map of another dtype": put("weight.nested_quant_map", lambda t: t.to(torch.int8)),
    "no nested tensors": drop("weight.nested_absmax", "weight.nested_quant_map"),
    "absmax float after all": put("weight.absmax", lambda t: t.to(torch.float32)),
    "no nested state": stated(nested_blocksize=None, nested_dtype=None, nested_offset=None),
    "no nested_offset": stated(nested_offset=None),
    "nested_offset text": stated(nested_offset="0.1"),
    "nested_offset true": stated(nested_offset=True),
    "nested_offset NaN": stated(nested_offset=NAN),
    "no nested_blocksize": stated(nested_blocksize=None),
    "nested_blocksize zero": stated(nested_blocksize=0),
    "nested_dtype unknown": stated(nested_dtype="bfloat17"),
}
DAMAGE_INT8: dict[str, Callable[[Tensors], Tensors]] = {
    "no weight": drop("weight"),
    "weight too short": put("weight", lambda t: t[:-1]),
    "weight flat": put("weight", lambda t: t.reshape(-1)),
    "weight transposed": put("weight", lambda t: t.t().contiguous()),
    "weight unsigned": put("weight", lambda t: t.view(torch.uint8)),
    "no SCB": drop("SCB"),
    "SCB too short": put("SCB", lambda t: t[:-1]),
    "SCB of another dtype": put("SCB", lambda t: t.to(torch.int32)),
    "another format": put("weight_format", lambda t: t + 1),
    "format NaN": put("weight_format", lambda t: t * NAN),
    "two formats": put("weight_format", lambda t: torch.zeros(2, dtype=torch.uint8)),
}


def refused(made: Any, tensors: Tensors) -> None:
    """Refused by name; describing them never ends in another exception."""
    target = make_target(64, 128)
    with pytest.raises(QuantmillError) as caught:
        made.codec.decode(tensors, target, torch.bfloat16)
    (finding,) = caught.value.findings
    assert finding.code == "QM-BNB-001" and finding.where == "layer" and finding.fix
    # Headers show a part of it, and that already while planning.
    with contextlib.suppress(QuantmillError):
        made.codec.describe(headers_of(tensors), target, torch.bfloat16)


DAMAGE_PLAIN: dict[str, Callable[[Tensors], Tensors]] = {
    "stray nested tensors": lambda t: {
        **t,
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": torch.ones(256),
    },
    "stray nested state": stated(nested_blocksize=256, nested_dtype="float32", nested_offset=0.5),
    "absmax of 8 bits": put("weight.absmax", lambda t: t.to(torch.uint8)),
}


@pytest.mark.parametrize("what", [*DAMAGE_4BIT, *DAMAGE_PLAIN])
def test_damaged_four_bits_are_a_finding(bench: Any, what: str) -> None:
    made = bench(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    damage = {**DAMAGE_4BIT, **DAMAGE_PLAIN}[what]
    refused(made, damage(made.codec.encode(made.form((64, 128)))))


@pytest.mark.parametrize("what", [*DAMAGE_4BIT, *DAMAGE_NESTED])
def test_damaged_double_quantization_is_a_finding(bench: Any, what: str) -> None:
    made = bench(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    damage = {**DAMAGE_4BIT, **DAMAGE_NESTED}[what]
    refused(made, damage(made.codec.encode(made.form((64, 128)))))


@pytest.mark.parametrize("what", DAMAGE_INT8)
def test_damaged_int8_is_a_finding(bench: Any, what: str) -> None:
    made = bench(load_in_8bit=True)
    tensors = DAMAGE_INT8[what](made.codec.encode(made.form((64, 128))))
    refused(made, tensors)
    # Alone, too: a plan may give a module its codec by name.
    made.codec = Int8Codec(made.config)
    refused(made, tensors)


def test_headers_tell_the_form(bench: Any) -> None:
    for fields in (
        {"load_in_8bit": True},
        *({"load_in_4bit": True, "bnb_4bit_blocksize": size} for size in (32, 64, 256)),
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ):
        made = bench(**fields)
        form = made.form((64, 128))
        headers = headers_of(made.codec.encode(form))
        described = made.codec.describe(headers, make_target(64, 128), torch.bfloat16)
        assert described is not None and described.nbytes == form.nbytes
        assert dict(described.traits()) == dict(form.traits())


@pytest.mark.parametrize("partial", ["weight.absmax", "weight.quant_map", BLOB, "weight"])
def test_a_part_of_a_layout_is_a_finding_while_planning(bench: Any, partial: str) -> None:
    made = bench(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    headers = headers_of(made.codec.encode(made.form((64, 128))))
    del headers[partial]
    with pytest.raises(QuantmillError, match="QM-BNB-001"):
        made.codec.describe(headers, make_target(64, 128), torch.bfloat16)


def test_codes_alone_are_a_finding_while_planning(bench: Any) -> None:
    for fields in ({"load_in_8bit": True}, {"load_in_4bit": True}):
        made = bench(**fields)
        headers = headers_of({"weight": made.codec.encode(made.form((64, 128)))["weight"]})
        with pytest.raises(QuantmillError, match="QM-BNB-001"):
            made.codec.describe(headers, make_target(64, 128), torch.bfloat16)


def test_a_float_weight_is_of_no_layout(bench: Any) -> None:
    headers = headers_of({"weight": torch.ones(64, 128)})
    for fields in ({"load_in_8bit": True}, {"load_in_4bit": True}):
        codec = bench(**fields).codec
        assert codec.describe(headers, make_target(64, 128), torch.bfloat16) is None
