"""The linears are bitsandbytes' own, compute what their form means, and keep it exactly."""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn

from quantmill.forms import Form
from quantmill.testing.peak import PeakBytes
from quantmill_bnb.linear import _state_of
from quantmill_bnb.packing import pack, unpack

PRESETS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True},
    "fp4-nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
FOUR = [name for name in PRESETS if name != "int8"]
SHAPES = {
    "packable": (64, 128),
    "rows that no kernel takes": (40, 128),
    "ragged": (64, 100),
    "odd": (33, 65),
    "narrow": (32, 3),
    "one column": (32, 1),
    "one row": (1, 64),
}
# Weights are exact, products are rounded: bfloat16 has 8 bits, and int8 activations 7.
NOISE = {"nf4": 0.01, "nf4-nested": 0.01, "fp4": 0.01, "fp4-nested": 0.01, "int8": 0.02}


@pytest.fixture(params=PRESETS)
def preset(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def made(bench: Any, preset: str) -> Any:
    extra = {} if preset == "int8" else {"bnb_4bit_compute_dtype": "bfloat16"}
    return bench(**PRESETS[preset], **extra)


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def reference(form: Form, x: Tensor, bias: Tensor | None = None) -> Tensor:
    added = None if bias is None else bias.float()
    return nn.functional.linear(x.float(), form.dequantize(torch.float32), added)


def noise(y: Tensor, form: Form, x: Tensor, bias: Tensor | None = None) -> float:
    """The error, over the size that such sums of products have: one that cancels may be small."""
    weight = form.dequantize(torch.float32)
    size = x.float().norm(dim=-1, keepdim=True) * weight.norm(dim=1) / x.shape[-1] ** 0.5
    if bias is not None:
        size = size + bias.float().abs()
    return ((y.float() - reference(form, x, bias)).norm() / size.norm()).item()


def stored(made: Any, form: Form) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.codec.encode(form).items()}


def assert_exact(module: nn.Module, wanted: dict[str, Tensor], when: str) -> None:
    state = module.state_dict()
    assert set(state) == set(wanted), when
    for name, tensor in wanted.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape), (when, name)
        one, other = (t.reshape(-1).contiguous().view(torch.uint8) for t in (state[name], tensor))
        assert torch.equal(one, other), (when, name)


def infer(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = module(x)
    return result


def test_they_are_the_librarys_own(made: Any, preset: str) -> None:
    module = made.linear(made.form((64, 128)), torch.zeros(64))
    kind = bnb.nn.Linear8bitLt if preset == "int8" else bnb.nn.Linear4bit
    assert isinstance(module, kind)
    weight = bnb.nn.Int8Params if preset == "int8" else bnb.nn.Params4bit
    assert type(module.weight) is weight  # PEFT asks for the class by its name
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("what", SHAPES)
def test_outputs_are_the_references(made: Any, preset: str, what: str) -> None:
    shape = SHAPES[what]
    form, bias = made.form(shape), inputs(shape[0], seed=2)
    for given in (None, bias):
        module = made.linear(form, None if given is None else given.clone())
        for lead in ((1,), (3,), (64,), (2, 5), (2, 1, 3), ()):
            for _ in range(2):  # the first forward may repack, the second finds it done
                x = inputs(*lead, shape[1])
                y = infer(module, x)
                assert y.shape == (*lead, shape[0]) and y.dtype == x.dtype
                assert noise(y, form, x, given) < NOISE[preset], (lead, given is None)


@pytest.mark.parametrize("block", [32, 256, 4096])
def test_every_block_size_computes(bench: Any, block: int) -> None:
    made = bench(**PRESETS["nf4"], bnb_4bit_blocksize=block)
    form = made.form((64, 4096))
    x = inputs(3, 4096)
    assert noise(infer(made.linear(form), x), form, x) < NOISE["nf4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_result_has_the_dtype_of_the_input(made: Any, preset: str, dtype: torch.dtype) -> None:
    form, bias = made.form((64, 128)), inputs(64, dtype=torch.float32)
    x = inputs(3, 128, dtype=dtype)
    y = infer(made.linear(form, bias.clone()), x)
    assert y.dtype == dtype and noise(y, form, x, bias) < NOISE[preset]


@pytest.mark.parametrize("what", SHAPES)
def test_whatever_happens_what_is_saved_is_exact(made: Any, what: str) -> None:
    """bitsandbytes saves rounded scales after a forward on a CPU (defect 3), and a bias of the
    compute dtype."""
    shape = SHAPES[what]
    form, bias = made.form(shape), torch.randn(shape[0])
    module = made.linear(form, bias.clone())
    wanted = {**stored(made, form), "bias": bias}
    assert_exact(module, wanted, "made")
    infer(module, inputs(3, shape[1]))
    assert_exact(module, wanted, "after a forward")
    assert_exact(copy.deepcopy(module), wanted, "copied after a forward")
    with pytest.raises(RuntimeError):
        infer(module, inputs(3, shape[1] + 1))
    assert_exact(module, wanted, "after a forward that failed")
    module.train()
    x = inputs(3, shape[1]).requires_grad_()
    module(x).sum().backward()
    assert_exact(module, wanted, "after training")
    infer(module.eval(), inputs(3, shape[1]))
    assert torch.equal(module.bias, bias) and module.bias.dtype == torch.float32
    assert torch.equal(made.factory.form_of(module).dequantize(), form.dequantize())


@pytest.mark.parametrize("storage", ["uint8", "int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_change_of_dtype_leaves_codes_alone(bench: Any, storage: str, nested: bool) -> None:
    """bitsandbytes casts codes that are stored as floats, as numbers."""
    made = bench(
        load_in_4bit=True, bnb_4bit_use_double_quant=nested, bnb_4bit_quant_storage=storage
    )
    form = made.form((64, 128))
    module, wanted = made.linear(form, torch.ones(64)), stored(made, form)
    for change in (
        lambda m: m.to(torch.float16),
        lambda m: m.float(),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.float32),
        lambda m: nn.Sequential(m).half()[0],
    ):
        infer(module, inputs(2, 128))  # packs, where the library does
        module = change(module)
        state = module.state_dict()
        assert state.pop("bias").dtype == module.bias.dtype != torch.float64
        assert set(state) == set(wanted)
        for name, tensor in wanted.items():
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
        x = inputs(2, 128)
        assert noise(infer(module, x), form, x, torch.ones(64)) < NOISE["fp4"]


def test_a_change_of_dtype_leaves_int8_scales_alone(bench: Any) -> None:
    made = bench(load_in_8bit=True)
    form = made.form((64, 128))
    for forward_first in (False, True):
        module = made.linear(form)
        if forward_first:
            infer(module, inputs(2, 128))
        assert_exact(module.to(torch.float16), stored(made, form), "cast")
        assert_exact(nn.Sequential(module).to("cpu", torch.bfloat16)[0], stored(made, form), "cast")
        x = inputs(2, 128)
        assert noise(infer(module, x), form, x) < NOISE["int8"]


def test_copies_are_apart(made: Any, preset: str) -> None:
    form = made.form((64, 128))
    module = made.linear(form, torch.ones(64))
    x = inputs(3, 128)
    before = infer(module, x)
    twin = copy.deepcopy(module)
    assert torch.equal(infer(twin, x), before)
    if preset != "int8":
        assert twin.weight.module is twin and twin.weight.quant_state is twin.quant_state
    with torch.no_grad():
        twin.weight.data.zero_()
        twin.bias.zero_()
    assert torch.equal(infer(module, x), before)
    assert_exact(module, {**stored(made, form), "bias": torch.ones(64)}, "its copy was changed")


@pytest.mark.parametrize("what", ["packable", "ragged", "odd", "one column"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_the_references(made: Any, preset: str, training: bool, what: str) -> None:
    shape = SHAPES[what]
    form = made.form(shape)
    module = made.linear(form, inputs(shape[0])).train(training)
    module.bias.requires_grad_()
    infer(module.eval(), inputs(2, shape[1]))  # as after an evaluation between two steps
    module.train(training)
    upstream = inputs(2, 3, shape[0], seed=5)
    for _ in range(2):
        module.bias.grad = None
        x = inputs(2, 3, shape[1]).requires_grad_()
        module(x).backward(upstream)
        wanted = upstream.float() @ form.dequantize(torch.float32)
        assert x.grad is not None and off(x.grad, wanted) < 0.01
        assert off(module.bias.grad, upstream.float().sum((0, 1))) < 0.02


def test_int8_trains_as_the_library_does_without_keeping_its_input(bench: Any) -> None:
    made = bench(load_in_8bit=True)
    module = made.linear(made.form((64, 128))).train()
    x, upstream = inputs(2, 3, 128).requires_grad_(), inputs(2, 3, 64, seed=5)
    held = x * 1
    kept = weakref.ref(held)
    result = module(held)
    del held
    assert kept() is None
    (ours,) = torch.autograd.grad(result, x, upstream)
    other = bnb.nn.Linear8bitLt.forward(module, x.reshape(-1, 128)).reshape(2, 3, 64)
    (theirs,) = torch.autograd.grad(other, x, upstream)
    assert off(result, other.float()) < 1e-3
    assert off(ours, theirs.float()) < 1e-3


def test_an_input_without_rows_has_a_result_without_rows(made: Any) -> None:
    # The library's CPU kernel ends the process.
    module = made.linear(made.form((64, 128)), torch.ones(64))
    for lead in ((0,), (2, 0, 3)):
        assert infer(module, inputs(*lead, 128)).shape == (*lead, 64)
        x = inputs(*lead, 128).requires_grad_()
        module(x).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("name", FOUR)
def test_whoever_looks_at_the_weight_sees_what_is_on_disk(bench: Any, name: str) -> None:
    """PEFT merges adapters into what it dequantizes; the packed weight decodes to noise."""
    made = bench(**PRESETS[name], bnb_4bit_compute_dtype="bfloat16")
    form = made.form((64, 128))
    module = made.linear(form)
    y = infer(module, inputs(3, 128))
    weight = module.weight
    seen = functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(seen, form.dequantize())
    assert torch.equal(infer(module, inputs(3, 128)), y)


def test_a_weight_is_packed_where_the_library_can_and_unpacking_is_exact(bench: Any) -> None:
    if not functional.has_avx512bf16():
        pytest.skip("the library packs on CPUs with AVX-512 BF16 only")
    for name in FOUR:
        for storage in ("uint8", "bfloat16", "float32"):
            made = bench(**PRESETS[name], bnb_4bit_quant_storage=storage)
            for shape in ((32, 64), (64, 128), (96, 192)):
                form = made.form(shape)
                module, wanted = made.linear(form), stored(made, form)
                infer(module, inputs(2, shape[1]))
                assert module._is_packed(), "the fused kernel is not used"
                assert_exact(module, wanted, "packed")
                assert module._is_packed(), "saving slows the next forward down"
                module.unpack()
                assert not module._is_packed()
                live = module.weight.data
                assert live.dtype == wanted["weight"].dtype
                assert torch.equal(live.view(torch.uint8), wanted["weight"].view(torch.uint8))
                assert_exact(module, wanted, "unpacked")


def test_packing_by_slices_is_what_the_library_makes_in_little_memory(bench: Any) -> None:
    for name in FOUR:
        form = bench(**PRESETS[name]).form((1056, 512))
        state = _state_of(form)
        data = form.codes.data
        wanted, theirs = functional._convert_weight_packed_for_cpu(data, copy.copy(state))
        with PeakBytes() as peak:
            packed, ours = pack(data, state)
        assert torch.equal(packed, wanted) and torch.equal(ours.absmax, theirs.absmax)
        known = {**vars(theirs), "original_storage_type": torch.uint8, "state2": None}
        same = {key for key in known if isinstance(known[key], str | int | bool | torch.dtype)}
        assert {key: vars(ours)[key] for key in same} == {key: known[key] for key in same}
        assert torch.equal(unpack(packed, ours), data.reshape(-1))
        assert peak.bytes < 3 << 20, "all of it at once takes five times as much"


def test_a_replaced_weight_is_what_is_computed_and_saved(bench: Any) -> None:
    # As PEFT does to merge an adapter.
    made = bench(**PRESETS["nf4"], bnb_4bit_compute_dtype="bfloat16")
    module = made.linear(made.form((64, 128)))
    infer(module, inputs(2, 128))
    weight, other = module.weight, made.weight((64, 128), seed=9)
    fields = {k: v for k, v in weight.__dict__.items() if k != "data" and not k.startswith("_")}
    module.weight = bnb.nn.Params4bit(other, **{**fields, "bnb_quantized": False}).to("cpu")
    form = made.form((64, 128), seed=9)
    for _ in range(2):
        assert noise(infer(module, inputs(2, 128)), form, inputs(2, 128)) < NOISE["nf4"]
        assert_exact(module, stored(made, form), "replaced")


LOGGER = "bitsandbytes.backends.cpu.ops"
SAID = (
    "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already"
    " `pip install kernels` and the kernels >= 0.11.1"
)


def test_the_hint_at_import_is_left_out_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger(LOGGER)
    with caplog.at_level(logging.WARNING, LOGGER):
        logger.warning(SAID, ModuleNotFoundError("No module named 'kernels'"))
        assert not caplog.messages
        logger.warning(SAID, OSError("the kernel does not load"))
        logger.warning("something else")
    assert [message.split(":")[-1][:17] for message in caplog.messages] == [
        " the kernel does ",
        "something else",
    ]


def test_importing_says_nothing() -> None:
    import subprocess
    import sys

    program = "import quantmill_bnb, bitsandbytes, quantmill_bnb.linear"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
