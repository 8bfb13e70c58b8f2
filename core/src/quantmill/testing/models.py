"""Promises about live models. They need a framework."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantmill
from quantmill.findings import QuantmillError
from quantmill.kept import KeptLinear
from quantmill.registrations import Capabilities
from quantmill.testing.base import Conformance, errors_of, off, same
from quantmill.testing.fabricate import write_tiny_gpt2, write_tiny_llama, write_tiny_mixtral

__all__ = ["ModelPromises"]


# On each test and not on the class: marks of a class would hold for the whole joined suite.
needs_framework = pytest.mark.usefixtures("framework")


def logits(model: Any, ids: Tensor) -> Tensor:
    """The model's answer."""
    with torch.inference_mode():
        result: Tensor = model(input_ids=ids).logits
    return result


class ModelPromises(Conformance):
    """Loading, saving and loading again change nothing; what is declared works in a model."""

    @needs_framework
    def test_load_save_reload_is_bit_equal(
        self, folder: Path, written: Path, able: Capabilities, ids: Tensor
    ) -> None:
        model = self.live(folder, able)
        answer = logits(model, ids)  # a forward may repack weights: saving must not notice
        reloaded = quantmill.load(written)
        assert same(model.state_dict(), reloaded.state_dict())
        assert torch.equal(answer, logits(reloaded, ids))

    @needs_framework
    def test_odd_widths_load_and_reload_or_are_refused(
        self, tmp_path: Path, able: Capabilities, ids: Tensor
    ) -> None:
        odd = write_tiny_llama(tmp_path / "odd", hidden=40, inner=65, heads=2)
        if errors_of(quantmill.plan(odd, self.method).findings):
            with pytest.raises(QuantmillError):
                self.live(odd, able)
            return
        model = self.live(odd, able)
        answer = logits(model, ids)
        if able.serialisable:
            reloaded = quantmill.load(self.write(odd, tmp_path / "out"))
            assert same(model.state_dict(), reloaded.state_dict())
            assert torch.equal(answer, logits(reloaded, ids))
        assert off(answer, logits(quantmill.dequantize(model), ids)) < self.max_linear_error

    @needs_framework
    def test_a_model_agrees_with_its_dequantized_self(
        self, tmp_path: Path, able: Capabilities, ids: Tensor
    ) -> None:
        source = write_tiny_llama(tmp_path / "biased", bias=True)
        model, reference = self.live(source, able), float_twin(self, source, able)
        assert off(logits(model, ids), logits(reference, ids)) < self.max_linear_error

    @needs_framework
    def test_what_is_dequantizable_becomes_a_float_model(
        self, folder: Path, able: Capabilities, ids: Tensor
    ) -> None:
        if not able.dequantizable:
            pytest.skip("declared as not dequantizable")
        model: Any = quantmill.dequantize(self.live(folder, able))
        module = model.model.layers[1].mlp.up_proj
        assert type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
        assert not hasattr(model.config, "quantization_config")
        float_names = set(quantmill.load(folder).state_dict())
        assert set(model.state_dict()) == float_names
        if able.on_the_fly:
            at_once = quantmill.load(folder, self.method, dequantize=True)
            assert same(at_once.state_dict(), model.state_dict())

    @needs_framework
    def test_what_is_trainable_carries_gradients_through_a_model(
        self, folder: Path, able: Capabilities, ids: Tensor
    ) -> None:
        if not able.trainable:
            with pytest.raises(QuantmillError) as caught:
                self.live(folder, able, training=True)
            assert "QM-FINAL-001" in {item.code for item in errors_of(caught.value.findings)}
            return
        model = self.live(folder, able, training=True)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.float().square().mean().backward()
        assert inputs.grad is not None and torch.isfinite(inputs.grad).all()
        assert inputs.grad.abs().sum() > 0

    @needs_framework
    def test_a_model_can_be_copied(self, folder: Path, able: Capabilities, ids: Tensor) -> None:
        model = self.live(folder, able)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, ids), logits(model, ids))
        assert same(twin.state_dict(), model.state_dict())

    @needs_framework
    def test_a_change_of_dtype_leaves_quantized_weights_alone(
        self, folder: Path, able: Capabilities, ids: Tensor
    ) -> None:
        model = self.live(folder, able)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        float_names = set(quantmill.load(folder).state_dict())
        # Through torch: transformers' own `to` refuses a dtype for some methods altogether.
        after = nn.Module.to(model, torch.float32).state_dict()
        assert set(after) == set(before)
        for name, tensor in after.items():
            if name in float_names and before[name].dtype == torch.bfloat16:
                assert tensor.dtype == torch.float32, name
            else:
                assert torch.equal(tensor, before[name]), name
        assert logits(model, ids).dtype == torch.float32

    @needs_framework
    def test_loading_in_threads_gives_what_loading_alone_gives(self, written: Path) -> None:
        default = torch.get_default_dtype()
        alone = quantmill.load(written).state_dict()
        try:
            with ThreadPoolExecutor(2) as pool:
                models = list(pool.map(quantmill.load, [written] * 4))
            assert torch.get_default_dtype() == default
        finally:
            torch.set_default_dtype(default)  # or every later test would fail of it
        assert all(same(model.state_dict(), alone) for model in models)

    @needs_framework
    def test_user_skips_are_added_to_the_defaults(self, folder: Path) -> None:
        skipped = "model.layers.0.mlp.down_proj"
        plain = {item.name: item.action for item in quantmill.plan(folder, self.method).modules}
        plan = quantmill.plan(folder, self.method, skip=[skipped])
        actions = {item.name: item.action for item in plan.modules}
        assert plain[skipped] == "quantize"
        assert actions == {**plain, skipped: "keep"}

    @needs_framework
    def test_a_skipped_module_is_still_float_after_reloading(
        self, folder: Path, able: Capabilities
    ) -> None:
        self.needs_writing(able)
        skipped, out = "model.layers.0.mlp.down_proj", folder.parent / "skipped"
        quantmill.quantize(folder, out, self.method, skip=[skipped], **self.options)
        module = quantmill.load(out).get_submodule(skipped)
        weight = quantmill.load(folder).get_submodule(skipped).weight
        assert isinstance(module, nn.Linear) and isinstance(weight, Tensor)
        assert type(module) in (nn.Linear, KeptLinear)
        assert torch.equal(module.weight, weight)

    @needs_framework
    def test_a_tied_head_stays_tied(self, tmp_path: Path, able: Capabilities) -> None:
        tied = write_tiny_llama(tmp_path / "tied", tied=True)
        model = self.live(tied, able)
        head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
        assert head.dtype == torch.bfloat16
        if "embedding" in able.target_kinds:
            # Both compute with one quantized weight, and it is stored once.
            assert torch.equal(head + 0, embedding + 0)
            assert not [name for name in model.state_dict() if name.startswith("lm_head")]
        else:
            assert head is embedding

    @needs_framework
    def test_declared_conv1d_modules_are_quantized(
        self, tmp_path: Path, able: Capabilities, ids: Tensor
    ) -> None:
        if "conv1d" not in able.target_kinds:
            pytest.skip("declared as not taking conv1d")
        source = write_tiny_gpt2(tmp_path / "gpt2")
        model = self.live(source, able)
        reference = float_twin(self, source, able)
        answer = logits(model, ids)
        assert off(answer, logits(reference, ids)) < self.max_linear_error
        assert not torch.equal(answer, logits(quantmill.load(source), ids))
        if able.serialisable:
            reloaded = quantmill.load(self.write(source, tmp_path / "out"))
            assert same(model.state_dict(), reloaded.state_dict())
            assert torch.equal(answer, logits(reloaded, ids))

    @needs_framework
    def test_experts_in_stacks_are_quantized_one_by_one(
        self, tmp_path: Path, able: Capabilities, ids: Tensor
    ) -> None:
        source = write_tiny_mixtral(tmp_path / "mixtral")
        plan = quantmill.plan(source, self.method)
        if errors_of(plan.findings):
            pytest.skip("it does not take such shapes")
        experts = [item for item in plan.modules if ".experts." in item.name]
        assert len(experts) == 12, "the plan shows every expert"
        assert all(item.action == "quantize" or item.reason for item in experts)
        if not able.on_the_fly:
            return  # What few tokens are worth, each method says in its own tests.
        model, reference = self.live(source, able), float_twin(self, source, able)
        answer, wanted = logits(model, ids).float(), logits(reference, ids).float()
        # A token that lies between two experts may go to the other one for the last bit's sake.
        apart = (answer - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(apart.median()) < self.max_linear_error
        if able.serialisable:
            reloaded = quantmill.load(self.write(source, tmp_path / "out"))
            assert same(model.state_dict(), reloaded.state_dict())
            assert torch.equal(answer, logits(reloaded, ids).float())


def float_twin(suite: Conformance, source: Path, able: Capabilities) -> Any:
    """The same model with its quantized weights as float ones."""
    return quantmill.dequantize(suite.live(source, able))
