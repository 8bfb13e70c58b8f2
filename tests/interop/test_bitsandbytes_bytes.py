"""Beside bitsandbytes: every tensor that we write has the bytes that its own modules would save.

Through the plugin's quantizer and codec, with the native kernels and with the torch reference.
Where bitsandbytes itself fails or writes what means nothing, a test says so and what we do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantmill.backend import NonFiniteWeight
from quantmill.findings import QuantmillError
from quantmill.host import default_host
from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target
from quantmill_bnb.codec import BnbCodec
from quantmill_bnb.config import BnbConfig
from quantmill_bnb.quantizer import BnbQuantizer, _nested_reference
from quantmill_bnb.tables import dynamic8, fp4, nf4
from quantmill_cpu.quantize import quantize_codebook

pytestmark = pytest.mark.interop

NATIVE = ("cpu-quantize-codebook4", "cpu-quantize-codebook8", "cpu-quantize-rows-int8")
PATHS = ["native", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
CPU = torch.device("cpu")


def config_of(**fields: Any) -> BnbConfig:
    return BnbConfig.from_user(fields)


def ours(weight: Tensor, config: BnbConfig, path: str, rows: int = 1000) -> dict[str, Tensor]:
    """What we write of a weight."""
    registry = KernelRegistry.of(default_host(), disable=() if path == "native" else NATIVE)
    quantizer = BnbQuantizer(config, device=CPU, kernels=registry)
    form = quantizer.quantize(make_target(*weight.shape), MatrixSource(weight, rows=rows))
    return BnbCodec(config).encode(form)


def theirs(weight: Tensor, config: BnbConfig) -> dict[str, Tensor]:
    """What bitsandbytes' own module has in its state_dict, quantized by itself on the CPU."""
    out_features, in_features = weight.shape
    if config.load_in_8bit:
        module: Any = bnb.nn.Linear8bitLt(in_features, out_features, False, has_fp16_weights=False)
        module.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        module = bnb.nn.Linear4bit(in_features, out_features, False)
        module.weight = bnb.nn.Params4bit(
            weight.clone(),
            requires_grad=False,
            blocksize=config.bnb_4bit_blocksize,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=getattr(torch, config.bnb_4bit_quant_storage),
            module=module,
        )
    return dict(module.to("cpu").state_dict())


def assert_same(mine: Mapping[str, Tensor], peers: Mapping[str, Tensor]) -> None:
    assert set(mine) == set(peers)
    for name, tensor in peers.items():
        one, other = mine[name].contiguous(), tensor.contiguous()
        if "quant_state" in name:
            assert json.loads(bytes(one.tolist())) == json.loads(bytes(other.tolist()))
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert torch.equal(
            one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        ), name


KINDS = ["normal", "outliers", "constant", "zeros", "zero rows", "tiny", "large", "entries"]


def weights(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Weights of one kind; all finite, also in float16."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator)
    if kind == "outliers":
        found = found * torch.randn(shape, generator=generator).exp() ** 3
    elif kind == "constant":
        found = torch.full(shape, 0.37)
    elif kind == "zeros":
        found = found * 0.0  # of both signs
    elif kind == "zero rows":
        found = found * (torch.arange(shape[0]) % 2).unsqueeze(1)
    elif kind == "tiny":
        found = found.sign() * torch.finfo(dtype).tiny * (found.abs() * 4).floor() / 4
    elif kind == "large":
        found = found.sign() * (found.abs() * 2e4)
    elif kind == "entries":
        table = torch.cat([nf4(), fp4(), (nf4()[1:] + nf4()[:-1]) / 2])
        found = table[torch.randint(0, len(table), shape, generator=generator)]
    return found.clamp(-6e4, 6e4).to(dtype)


# fmt: off
WEIGHTS = st.builds(
    weights,
    st.sampled_from(KINDS),
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 150)),
        st.sampled_from([(1, 1), (1, 64), (64, 1), (3, 4096), (33, 65), (257, 64), (128, 256)]),
    ),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
# fmt: on


def test_the_native_kernels_are_there() -> None:
    registry = KernelRegistry.of(default_host())
    found = {kernel.name: registry.unavailable(kernel) for kernel in registry.kernels}
    assert {name: found.get(name, "not registered") for name in NATIVE} == dict.fromkeys(NATIVE)


def test_the_tables_are_theirs() -> None:
    mine = {"nf4": nf4(), "fp4": fp4(), "dynamic8": dynamic8()}
    peers = {kind: functional.get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4")}
    assert_same(mine, {**peers, "dynamic8": functional.create_dynamic_map()})


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@settings(deadline=None, max_examples=40)
@given(weight=WEIGHTS, block=st.sampled_from(BLOCKS), rows=st.sampled_from([1, 7, 1000]))
def test_four_bits_are_theirs(
    kind: str, nested: bool, weight: Tensor, block: int, rows: int
) -> None:
    config = config_of(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_blocksize=block,
    )
    peers = theirs(weight, config)
    for path in PATHS:
        assert_same(ours(weight, config, path, rows), peers)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_large_weight_in_row_blocks_is_theirs(
    kind: str, nested: bool, dtype: torch.dtype, path: str
) -> None:
    # Enough scales that their mean is summed by several threads.
    weight = weights("normal", (1030, 1025), dtype, 1)
    config = config_of(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_blocksize=32,
    )
    assert_same(ours(weight, config, path, rows=300), theirs(weight, config))


@settings(deadline=None, max_examples=40)
@given(weight=WEIGHTS, storage=st.sampled_from(["int8", "float16", "bfloat16", "float32"]))
def test_other_storages_are_theirs_or_padded(weight: Tensor, storage: str) -> None:
    """bitsandbytes views the packed bytes as the storage's dtype, and can't where they do not fill
    it, or are a single byte. We pad with zeros, and read that back."""
    config = config_of(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    packed = (weight.numel() + 1) // 2
    if packed % getattr(torch, storage).itemsize == 0 and packed > 1:
        peers = theirs(weight, config)
        for path in PATHS:
            assert_same(ours(weight, config, path), peers)
        return
    with pytest.raises((RuntimeError, IndexError)):
        theirs(weight, config)
    bytewise = config_of(load_in_4bit=True)
    again = BnbCodec(config).decode(
        ours(weight, config, "native"), make_target(*weight.shape), weight.dtype
    )
    assert_same(BnbCodec(bytewise).encode(again), theirs(weight, bytewise))


@settings(deadline=None, max_examples=60)
@given(weight=WEIGHTS, rows=st.sampled_from([1, 7, 1000]))
def test_int8_is_theirs(weight: Tensor, rows: int) -> None:
    config = config_of(load_in_8bit=True)
    peers = theirs(weight, config)
    assert set(peers) == {"weight", "SCB", "weight_format"}
    for path in PATHS:
        assert_same(ours(weight, config, path, rows), peers)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 3000),
    seed=st.integers(0, 999),
    power=st.sampled_from([0, -30, -126, -130, -140, 120]),
    zeros=st.booleans(),
)
def test_nested_scales_are_theirs_also_where_they_have_no_reciprocal(
    count: int, seed: int, power: int, zeros: bool
) -> None:
    """1 / absmax overflows below 2.94e-39: there bitsandbytes' codes are the first and the last."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(count, generator=generator) * 2.0**power
    if zeros:
        scales[: count // 2] = 0.0
    codes, state = functional.quantize_blockwise(scales, blocksize=256)
    mine, absmax = torch.empty(count, dtype=torch.uint8), torch.empty(-(-count // 256))
    quantize_codebook(scales, table="dynamic8", block_size=256, out_codes=mine, out_scale=absmax)
    assert torch.equal(mine, codes) and torch.equal(absmax, state.absmax)
    mine, absmax = _nested_reference(scales, dynamic8())
    assert torch.equal(mine, codes) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fields", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_they_quantize_what_is_not_finite_and_we_refuse(
    fields: dict[str, bool], value: float, path: str
) -> None:
    weight = weights("normal", (6, 64), torch.float32, 3)
    weight[4, 5] = weight[5, 0] = value
    saved = theirs(weight, config_of(**fields))
    scales = saved["SCB" if "SCB" in saved else "weight.absmax"]
    assert not scales.isfinite().all(), "the peer refuses it by now: so the test can go"
    with pytest.raises(NonFiniteWeight) as caught:
        ours(weight, config_of(**fields), path)
    assert caught.value.index == 4 * 64 + 5


@pytest.mark.parametrize("path", PATHS)
def test_they_lose_a_row_that_overflows_float16_and_we_refuse(path: str) -> None:
    weight = weights("normal", (6, 64), torch.float32, 3)
    weight[2, 7] = 70000.0
    saved = theirs(weight, config_of(load_in_8bit=True))
    assert saved["SCB"][2].isinf() and not saved["weight"][2].any()
    with pytest.raises(NonFiniteWeight) as caught:
        ours(weight, config_of(load_in_8bit=True), path)
    assert caught.value.index == 2 * 64 + 7


@pytest.mark.parametrize("path", PATHS)
def test_they_lose_scales_whose_sum_overflows_and_we_refuse(path: str) -> None:
    config = config_of(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    weight = weights("normal", (4, 64), torch.float32, 3).sign() * 3e38
    saved = theirs(weight, config)
    assert b"Infinity" in bytes(saved["weight.quant_state.bitsandbytes__fp4"].tolist())
    with pytest.raises(QuantmillError, match=r"QM-BNB-002.*layer\.weight"):
        ours(weight, config, path)
