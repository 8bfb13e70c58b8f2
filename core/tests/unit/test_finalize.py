"""Forms attached to parameters, the core's linear, training set-up and the way back to float."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.backend import Codec
from quantmill.findings import Findings, QuantmillError
from quantmill.forms import Affine, Channel, Codes, Form
from quantmill.host import Host
from quantmill.job import Job, Request, Selection
from quantmill.kernels import KernelRegistry
from quantmill.linear import FormLinear, FormLinearFactory
from quantmill.planning import ModulePlan, Plan
from quantmill.registrations import Capabilities, Kernel, Method
from quantmill.stages.attach import attach_form, detach_forms
from quantmill.stages.finalize import core_finalize, dequantize_model, prepare_training
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target


class RowCodec(Codec[Any]):
    """``weight`` int8 and ``weight.scale`` float32, one for each row."""

    suffixes = ("weight", "weight.scale")

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine) and isinstance(form.scale, Tensor)
        return {"weight": form.codes.data, "weight.scale": form.scale}

    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        codes = Codes(tensors["weight"], 8, tuple(tensors["weight"].shape), "i8")
        return Affine(codes, tensors["weight.scale"], Channel(0), factor=1 / 127, dtype=dtype)

    def describe(self, headers: Any, target: Target, dtype: torch.dtype) -> Form | None:
        return None


def form_of(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Affine:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Affine.quantize_rows_int8(weight, dtype)


def registry(*kernels: Kernel) -> KernelRegistry:
    return KernelRegistry(kernels, environment=False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(9))


# -- forms attached to parameters ------------------------------------------------------------------


class Experts(nn.Module):
    """Two stacked parameters, the second as its transpose, and a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(8, 6))
        self.down = nn.Parameter(torch.zeros(8, 6))
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up.T) @ self.down + self.bias


def attached() -> tuple[Experts, Affine, Affine]:
    module, up, down = Experts(), form_of(8, 6, 1), form_of(6, 8, 2)
    attach_form(module, "up", up, torch.float32, codec=RowCodec(None))
    attach_form(module, "down", down, torch.float32, codec=RowCodec(None), transposed=True)
    return module, up, down


def test_a_forward_uses_the_dequantized_forms(x: Tensor) -> None:
    module, up, down = attached()
    expected = torch.relu(x @ up.dequantize().T) @ down.dequantize().T + module.bias
    assert torch.equal(module(x), expected)


def test_no_float_weight_is_kept(x: Tensor) -> None:
    module, _, _ = attached()
    module(x)
    held = sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])
    assert held == module.bias.numel()


def test_gradients_go_through_to_the_input_and_not_to_the_forms(x: Tensor) -> None:
    module, up, down = attached()
    plain = Experts()
    plain.up.data, plain.down.data = up.dequantize(), down.dequantize().T.contiguous()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(one).square().sum().backward()
    plain(two).square().sum().backward()
    assert one.grad is not None and two.grad is not None
    assert torch.allclose(one.grad, two.grad, atol=1e-5) and one.grad.abs().sum() > 0
    trainable = [name for name, item in module.named_parameters() if item.requires_grad]
    assert trainable == ["bias"]


def test_the_state_is_what_the_codec_encodes() -> None:
    module, up, down = attached()
    model = nn.Sequential(nn.Linear(6, 6), module)
    state = model.state_dict()
    assert set(state) == {
        "0.weight",
        "0.bias",
        "1.bias",
        "1.up",
        "1.up.scale",
        "1.down",
        "1.down.scale",
    }
    assert torch.equal(state["1.up"], up.codes.data)
    assert torch.equal(state["1.down.scale"], RowCodec(None).encode(down)["weight.scale"])


def test_without_a_codec_the_state_has_no_trace_of_them() -> None:
    module = Experts()
    attach_form(module, "up", form_of(8, 6), torch.float32)
    assert set(module.state_dict()) == {"down", "bias"}


def test_after_removal_the_module_is_as_if_it_had_never_been_quantized(x: Tensor) -> None:
    module, up, down = attached()
    before = module(x)
    assert detach_forms(nn.ModuleList([module])) == 2
    # Not to the bit: the order of a product's sums depends on how its operands lie in memory.
    assert type(module) is Experts and torch.allclose(module(x), before, rtol=1e-5)
    state = module.state_dict()
    assert set(state) == {"up", "down", "bias"} == {name for name, _ in module.named_parameters()}
    assert torch.equal(state["up"], up.dequantize())
    assert torch.equal(state["down"], down.dequantize().T)
    assert all(tensor.is_contiguous() for tensor in state.values()), "safetensors writes no other"
    assert detach_forms(module) == 0


def test_one_of_several_can_be_attached_again(x: Tensor) -> None:
    module, _, _ = attached()
    detach_forms(module)
    again = form_of(8, 6, 5)
    attach_form(module, "up", again, torch.float32, codec=RowCodec(None))
    assert torch.equal(module.up, again.dequantize())
    assert set(module.state_dict()) == {"up", "up.scale", "down", "bias"}


def test_a_change_of_dtype_leaves_codes_and_scales_alone() -> None:
    module, up, _ = attached()
    module.to(torch.float16)
    state = module.state_dict()
    assert state["up"].dtype == torch.int8 and torch.equal(state["up"], up.codes.data)
    assert torch.equal(state["up.scale"], RowCodec(None).encode(up)["weight.scale"])
    assert state["bias"].dtype == torch.float16


# -- the core's linear -----------------------------------------------------------------------------


def test_the_linear_computes_the_reference(x: Tensor) -> None:
    form, bias = form_of(4, 6), torch.arange(4.0)
    module = FormLinear(form, bias, RowCodec(None), registry(), "float32")
    assert torch.equal(module(x), nn.functional.linear(x, form.dequantize(), bias))
    assert torch.allclose(module(x[0]), module(x)[0], atol=1e-6), "any number of rows"
    assert (module.out_features, module.in_features) == (4, 6)
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_answers_in_the_dtype_it_was_asked_in(dtype: torch.dtype, x: Tensor) -> None:
    module = FormLinear(form_of(4, 6), torch.ones(4), RowCodec(None), registry(), "float32")
    assert module(x.to(dtype)).dtype == dtype


def test_its_gradient_is_that_of_the_float_linear(x: Tensor) -> None:
    form = form_of(4, 6)
    module = FormLinear(form, torch.ones(4), RowCodec(None), registry(), "float32")
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(one).square().sum().backward()
    nn.functional.linear(two, form.dequantize(), torch.ones(4)).square().sum().backward()
    assert one.grad is not None and torch.allclose(one.grad, two.grad, atol=1e-5)  # type: ignore[arg-type]


def test_its_state_is_what_the_codec_encodes() -> None:
    form = form_of(4, 6)
    module = FormLinear(form, torch.ones(4), RowCodec(None), registry(), "float32")
    state = nn.Sequential(module).state_dict()
    assert set(state) == {"0.weight", "0.weight.scale", "0.bias"}
    assert torch.equal(state["0.weight"], form.codes.data)
    plain = FormLinear(form, None, RowCodec(None), registry(), "float32")
    assert set(plain.state_dict()) == {"weight", "weight.scale"}


def test_dtypes_leave_its_codes_alone_and_devices_take_them_along() -> None:
    form = form_of(4, 6)
    module = FormLinear(form, torch.ones(4), RowCodec(None), registry(), "float32")
    module.to(torch.float64)
    assert module.bias is not None and module.bias.dtype == torch.float64
    for name, tensor in module.form.tensors().items():
        assert torch.equal(tensor, form.tensors()[name]), name
        assert tensor.dtype == form.tensors()[name].dtype, name
    module.to("meta")
    assert all(tensor.is_meta for tensor in module.form.tensors().values())


def doubled(form: Affine) -> dict[str, Tensor]:
    return {"columns": form.codes.data.T.contiguous(), "scale": form.scale.clone()}  # type: ignore[union-attr]


def halved(tensors: Mapping[str, Tensor], skeleton: Affine) -> Affine:
    codes = Codes(tensors["columns"].T.contiguous(), 8, skeleton.shape, "i8")
    return Affine(codes, tensors["scale"], Channel(0), factor=1 / 127, dtype=skeleton.dtype)


def by_columns(x: Tensor, prepared: Any, bias: Tensor | None) -> Tensor:
    weight = prepared.tensors["columns"].float() * prepared.tensors["scale"] / 127
    out = x @ weight.to(x.dtype)
    return out if bias is None else out + bias


def test_a_kernels_layout_is_what_lives_and_never_what_is_saved(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = types.ModuleType("toy_kernels")
    toy.__dict__.update(prepare=doubled, restore=halved, matmul=by_columns)
    monkeypatch.setitem(sys.modules, "toy_kernels", toy)
    kernel = Kernel(
        "toy",
        "matmul",
        "affine",
        "toy_kernels:matmul",
        layout="columns",
        prepare="toy_kernels:prepare",
        restore="toy_kernels:restore",
    )
    form = form_of(4, 6)
    module = FormLinear(form, torch.ones(4), RowCodec(None), registry(kernel), "float32")
    reference = nn.functional.linear(x, form.dequantize(), torch.ones(4))
    assert torch.allclose(module(x), reference, atol=1e-5)
    assert torch.equal(module.state_dict()["weight"], form.codes.data)
    assert torch.equal(module.to(torch.bfloat16).form.codes.data, form.codes.data)
    grown = x.clone().requires_grad_()
    module(grown).sum().backward()
    assert torch.allclose(grown.grad, form.dequantize().sum(0).expand(3, 6), atol=1e-5)  # type: ignore[arg-type]


# -- training --------------------------------------------------------------------------------------


class Block(nn.Module):
    """A norm, a linear and a convolution in 16 bits, with a parameter that is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.batch_norm(self.linear(self.norm(x)) * self.scale)
        return result

    def gradient_checkpointing_enable(self) -> None:
        self.calls.append("checkpointing")

    def enable_input_require_grads(self) -> None:
        self.calls.append("inputs")


def test_training_freezes_the_base_and_computes_norms_in_float32() -> None:
    model = prepare_training(Block().to(torch.bfloat16).eval())
    assert (
        isinstance(model, Block) and model.training and model.calls == ["checkpointing", "inputs"]
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())
    wide = {name for name, item in model.state_dict().items() if item.dtype == torch.float32}
    assert wide == {
        "norm.weight",
        "norm.bias",
        "batch_norm.weight",
        "batch_norm.bias",
        "batch_norm.running_mean",
        "batch_norm.running_var",
    }
    assert model.batch_norm.num_batches_tracked.dtype == torch.int64


def test_around_a_float32_norm_everything_keeps_its_dtype(x: Tensor) -> None:
    model = prepare_training(Block().to(torch.bfloat16))
    seen: dict[str, torch.dtype] = {}
    model.norm.register_forward_pre_hook(lambda m, inputs: seen.update(norm=inputs[0].dtype))  # type: ignore[operator, union-attr]
    model.linear.register_forward_pre_hook(lambda m, inputs: seen.update(linear=inputs[0].dtype))  # type: ignore[operator, union-attr]
    inputs = x.to(torch.bfloat16).requires_grad_()
    out = model(inputs)
    assert seen == {"norm": torch.float32, "linear": torch.bfloat16}
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


def test_preparing_twice_changes_nothing_and_float32_models_get_no_hooks(x: Tensor) -> None:
    once, twice = Block().to(torch.bfloat16), Block().to(torch.bfloat16)
    prepare_training(once, checkpointing=False)
    prepare_training(prepare_training(twice, checkpointing=False), checkpointing=False)
    assert "checkpointing" not in once.calls + twice.calls
    assert len(once.norm._forward_hooks) == len(twice.norm._forward_hooks) == 1
    assert not prepare_training(Block()).norm._forward_hooks  # type: ignore[union-attr]


# -- back to float ---------------------------------------------------------------------------------


def quantized_model(monkeypatch: pytest.MonkeyPatch, trainable: bool = True) -> tuple[Any, Affine]:
    """A model as the stages leave it: a linear with a form, an attached form, the job on it."""
    toy = types.ModuleType("toy_backend")
    toy.__dict__["RowCodec"] = RowCodec
    monkeypatch.setitem(sys.modules, "toy_backend", toy)
    able = Capabilities(on_the_fly=True, trainable=trainable)
    method = Method("toy", "", "toy_backend:C", "toy_backend:Q", "toy_backend:RowCodec", able)
    job = Job(host=Host(discover=False), headers=None, request=Request())  # type: ignore[arg-type]
    job.selections = {"toy": Selection("toy", method, None)}  # type: ignore[arg-type]
    form = form_of(4, 6, dtype=torch.bfloat16)
    info = ParameterInfo("0.weight", (4, 6), "BF16", ("0.weight",))
    target = Target(ModuleInfo("0", "linear", "Linear", {"weight": info}), "weight", "linear", 4, 6)
    numbers = (24, 0, 0, 0)
    entry = ModulePlan(
        "0", "linear", (4, 6), "quantize", "toy", "", "", "", *numbers, target=target
    )
    job.plan = Plan("", "cpu", "bfloat16", {}, [entry], Findings())
    linear = FormLinearFactory(None, RowCodec(None), registry()).build(
        target, form, torch.ones(4), torch.bfloat16
    )
    model: Any = nn.Sequential(linear, Experts())
    attach_form(model[1], "up", form_of(8, 6), torch.bfloat16)
    model.quantmill_job = job
    return model, form


def test_dequantizing_gives_plain_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = quantized_model(monkeypatch)
    model.eval()
    assert dequantize_model(model) is model
    assert type(model[0]) is nn.Linear and not model[0].training
    assert torch.equal(model[0].weight, form.dequantize(torch.bfloat16))
    assert torch.equal(model[0].bias, torch.ones(4, dtype=torch.bfloat16))
    assert not hasattr(model, "quantmill_job")
    assert type(model[1]) is Experts and model[1].up.dtype == torch.bfloat16


def test_dequantizing_to_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = quantized_model(monkeypatch)
    dequantize_model(model, torch.float32)
    assert torch.equal(model[0].weight, form.dequantize(torch.float32))
    assert model[0].bias.dtype == torch.float32


def test_a_model_of_somebody_else_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert dequantize_model(model) is model
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_method_that_carries_no_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized_model(monkeypatch, trainable=False)
    model.quantmill_job.options.training = True
    with pytest.raises(QuantmillError) as caught:
        list(core_finalize(model.quantmill_job, model))
    assert [item.code for item in caught.value.findings] == ["QM-FINAL-001"]


@pytest.mark.parametrize("supported", [True, False])
def test_checkpointing_that_a_framework_lacks_is_a_finding(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = quantized_model(monkeypatch)
    calls: list[str] = []
    model.supports_gradient_checkpointing = supported
    model.gradient_checkpointing_enable = lambda: calls.append("enabled")
    model.quantmill_job.options.training = True
    found = [item.code for item in core_finalize(model.quantmill_job, model)]
    assert (found, calls) == (([], ["enabled"]) if supported else (["QM-FINAL-002"], []))
    assert model.training
