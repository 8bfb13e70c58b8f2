"""Promises about the modules that compute with a form. No framework is needed."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.backend import Codec, LinearFactory, Quantizer
from quantmill.config import MethodConfig
from quantmill.embedding import FormWeight
from quantmill.job import Job, Selection
from quantmill.kernels import KernelRegistry, Prepared
from quantmill.registrations import Capabilities
from quantmill.testing.base import Conformance, make_target, normal, off, same

__all__ = ["LinearPromises", "held_bytes", "held_tensors"]

# What modules share or what describes them: not the weight they hold.
_SHARED = (
    Codec,
    KernelRegistry,
    MethodConfig,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    type,
)


def held_bytes(module: nn.Module) -> int:
    """Bytes of all memory that is reachable from a module, wherever it keeps it; what several
    storages share counts once."""
    storages = (item.untyped_storage() for item in held_tensors(module))
    spans = sorted({(item.data_ptr(), item.data_ptr() + item.nbytes()) for item in storages})
    total = end = 0
    for start, stop in spans:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that is reachable from a module, wherever it keeps it."""
    seen: set[int] = set()
    todo: list[Any] = [module]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, _SHARED):
            continue
        seen.add(id(item))
        if isinstance(item, FormWeight):
            continue  # Made where it is used: its form is the module's own.
        if isinstance(item, Tensor) and not item.is_meta:
            yield item
        if isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list | tuple | set):
            todo.extend(item)
        elif dataclasses.is_dataclass(item):
            todo.extend(getattr(item, field.name) for field in dataclasses.fields(item))
        if hasattr(item, "__dict__"):
            todo.extend(vars(item).values())


class LinearPromises(Conformance):
    """A module computes what its form means, and keeps the form exactly."""

    def test_a_linear_agrees_with_its_dequantized_weight(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any]
    ) -> None:
        for shape in self.taken(quantizer):
            form = self.form(quantizer, shape)
            bias = normal((shape[0],), 5) * 3
            weight = form.dequantize(torch.float32)
            for given in (None, bias):
                module = self.linear(factory, form, given)
                x = normal((4, shape[1]), 7)
                added = torch.zeros(shape[0]) if given is None else given.float()
                wanted = nn.functional.linear(x.float(), weight, added)
                # Of few terms the sum may happen to be small: what they are worth is compared.
                worth = nn.functional.linear(x.float() ** 2, weight**2, added**2).sqrt()
                with torch.inference_mode():
                    error = (module(x).float() - wanted).norm() / worth.norm()
                assert error < self.max_linear_error, (shape, given)

    def test_a_linear_takes_the_inputs_that_torch_takes(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any]
    ) -> None:
        form = self.form(quantizer)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            module = self.linear(factory, form, dtype=dtype)
            for lead in ((3,), (2, 3), (1,), (2, 1, 5)):
                x = normal((*lead, 128), 7, dtype)
                with torch.inference_mode():
                    y = module(x)
                    apart = module(normal((*lead, 256), 7, dtype)[..., ::2])
                assert y.shape == apart.shape == (*lead, 64) and y.dtype == dtype, lead

    def test_an_empty_batch_gives_an_empty_result(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any]
    ) -> None:
        # An expert that no token was sent to.
        module = self.linear(factory, self.form(quantizer), normal((64,), 5))
        for lead in ((0,), (2, 0)):
            with torch.inference_mode():
                assert module(normal((*lead, 128))).shape == (*lead, 64)

    def test_what_is_trainable_carries_the_right_gradient(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any], able: Capabilities
    ) -> None:
        if not able.trainable:
            pytest.skip("declared as not trainable")
        form = self.form(quantizer)
        module = self.linear(factory, form).train()
        assert not any(parameter.requires_grad for parameter in module.parameters())
        x, upstream = normal((4, 128), 7).requires_grad_(), normal((4, 64), 8)
        module(x).backward(upstream)
        wanted = upstream.float() @ form.dequantize(torch.float32)
        assert x.grad is not None and off(x.grad, wanted) < self.max_linear_error

    def test_what_is_compileable_compiles_without_a_break(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any], able: Capabilities
    ) -> None:
        if not able.compileable:
            pytest.skip("declared as not compileable")
        module = self.linear(factory, self.form(quantizer), normal((64,), 5))
        x = normal((4, 128), 7)
        torch._dynamo.reset()
        # No code is generated: a graph break would already be an error before that.
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert off(compiled(x), module(x)) < self.max_linear_error
        torch._dynamo.reset()

    def test_the_state_dict_is_what_the_codec_encodes_whatever_happened(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any], codec: Codec[Any]
    ) -> None:
        for shape in self.taken(quantizer):
            form, bias = self.form(quantizer, shape), normal((shape[0],), 5)
            stored = {name: item.clone() for name, item in codec.encode(form).items()}
            module = self.linear(factory, form, bias.clone())
            assert same(module.state_dict(), {**stored, "bias": bias}), shape
            with torch.inference_mode():
                module(normal((4, shape[1]), 7))  # may repack weights: saving must not notice
            assert same(module.state_dict(), {**stored, "bias": bias}), shape
            assert same(copy.deepcopy(module).state_dict(), {**stored, "bias": bias}), shape
            for dtype in (torch.float16, torch.float32, torch.bfloat16):
                # A change of dtype is for activations: codes and scales are not to be touched.
                state = module.to(dtype).state_dict()
                assert state.pop("bias").dtype == dtype
                assert same(state, stored), (shape, dtype)

    def test_the_exact_form_comes_back(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any]
    ) -> None:
        form = self.form(quantizer)
        wanted = form.dequantize(torch.float32)
        module = self.linear(factory, form)
        for _ in range(2):
            back = factory.form_of(module)
            assert back is not None and back.dtype == torch.bfloat16
            assert torch.equal(back.dequantize(torch.float32), wanted)
            with torch.inference_mode():
                module(normal((4, 128), 7))
        assert factory.form_of(nn.Linear(2, 2)) is None

    def test_a_copy_is_independent_and_computes_the_same(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any]
    ) -> None:
        module, x = self.linear(factory, self.form(quantizer), normal((64,), 5)), normal((4, 128))
        with torch.inference_mode():
            wanted = module(x).clone()
            twin = copy.deepcopy(module)
            assert torch.equal(twin(x), wanted)
            for tensor in twin.state_dict().values():
                tensor.zero_()
            assert torch.equal(module(x), wanted)

    def test_planned_memory_is_what_the_module_holds(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any]
    ) -> None:
        for shape in ((64, 128), (32, 512)):
            if self.refused(quantizer, shape):
                continue
            module = self.linear(factory, self.form(quantizer, shape))
            planned = quantizer.abstract(make_target(*shape), torch.bfloat16)
            promised = factory.resident_bytes(planned)
            # A kernel may hold less of values that turn out to be all the same.
            assert 0.95 * promised <= held_bytes(module) <= promised, shape

    def test_its_kernels_agree_with_the_reference(
        self, quantizer: Quantizer[Any], job: Job, selection: Selection
    ) -> None:
        mine = [k for plugin, k in job.host.registered("kernels") if plugin == selection.plugin]
        form = self.form(quantizer)
        weight = form.dequantize(torch.float32)
        tried = 0
        for kernel in mine:
            facts = form if kernel.form == form.kind else form.regular()
            registry = KernelRegistry([kernel], environment=False)
            for dtype in kernel.dtypes:
                choice = registry.choose(
                    kernel.operation, facts.kind, facts.traits(), device="cpu", dtype=dtype, rows=1
                )
                if choice is None or kernel.operation == "quantize":
                    continue
                tried += 1
                kept = facts if kernel.prepare is None else Prepared.of(kernel, facts)
                if isinstance(kept, Prepared):
                    assert same(kept.restore().tensors(), facts.tensors()), kernel.name
                real = getattr(torch, dtype)
                if kernel.operation == "dequantize":
                    assert off(choice.load()(kept, real), weight) < 0.01, (kernel.name, dtype)
                else:
                    x, bias = normal((1, 128), 7, real), normal((64,), 5, real)
                    wanted = nn.functional.linear(x.float(), weight, bias.float())
                    result = choice.bind(kept)(x, bias)
                    assert result.dtype == real
                    assert off(result, wanted) < self.max_linear_error, (kernel.name, dtype)
        if not tried:
            pytest.skip("it has no kernel for its forms on this machine")

    def test_declared_devices_compute(
        self, quantizer: Quantizer[Any], factory: LinearFactory[Any], able: Capabilities
    ) -> None:
        if "cuda" not in able.devices or not torch.cuda.is_available():
            pytest.skip("no device but the CPU is declared and there")
        form = self.form(quantizer)
        wanted = nn.functional.linear(normal((4, 128), 7).float(), form.dequantize(torch.float32))
        module = self.linear(factory, form).to("cuda")
        with torch.inference_mode():
            result = module(normal((4, 128), 7).to("cuda"))
        assert result.device.type == "cuda"
        assert off(result.cpu(), wanted) < self.max_linear_error
        assert same(
            {n: t.cpu() for n, t in module.state_dict().items()},
            self.linear(factory, form).state_dict(),
        )
