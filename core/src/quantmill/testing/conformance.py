"""Checks that any backend passes: what it declares is true and what it writes is what it read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import quantmill
from quantmill.api import make_job, method_schema
from quantmill.backend import Codec, Quantizer
from quantmill.checkpoint.source import open_source, read_headers
from quantmill.findings import FindingsError, QuantmillError
from quantmill.forms import Form
from quantmill.host import Host, Status, default_host
from quantmill.job import Selection
from quantmill.registrations import resolve
from quantmill.stages.configure import configure
from quantmill.stages.select import select
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target
from quantmill.testing.fabricate import write_tiny_llama

__all__ = ["MethodConformance"]

HEAVY = ("torch", "pydantic", "transformers", "bitsandbytes", "torchao", "numpy")


class _Matrix:
    """A weight in memory, as a :class:`quantmill.backend.WeightSource`."""

    def __init__(self, weight: Tensor, name: str = "layer.weight") -> None:
        self.name, self.dtype, self.shape = name, weight.dtype, tuple(weight.shape)
        self._weight = weight

    def tensor(self) -> Tensor:
        return self._weight

    def row_blocks(self, multiple: int = 1) -> Any:
        step = max(multiple, 3 // multiple * multiple)
        for start in range(0, self.shape[0], step):
            yield start, self._weight[start : start + step]


def make_target(out_features: int, in_features: int) -> Target:
    """A linear target that belongs to no model."""
    info = ParameterInfo("layer.weight", (out_features, in_features), "BF16", ("layer.weight",))
    module = ModuleInfo("layer", "linear", "Linear", {"weight": info})
    return Target(module, "weight", "linear", out_features, in_features)


class MethodConformance:
    """Subclass with ``method`` set; each test is one promise of the contract."""

    method: ClassVar[str]
    """A METHOD: short name, with options if needed."""
    max_error: ClassVar[float] = 0.2
    """Most relative error of the Frobenius norm on normal weights."""
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((64, 128), (7, 65), (33, 96), (1, 3))
    """Shapes to quantize, ragged ones among them. Shapes a method refuses must raise findings."""
    bad_field: ClassVar[str] = "surely_not_a_field"

    @pytest.fixture
    def host(self) -> Host:
        """The host with all installed plugins."""
        return default_host()

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A tiny float Llama."""
        return write_tiny_llama(tmp_path / "float")

    @pytest.fixture
    def selection(self, folder: Path) -> Selection:
        """The method with its config."""
        return next(iter(select(make_job(folder, self.method)).values()))

    @pytest.fixture
    def quantizer(self, selection: Selection, folder: Path) -> Quantizer[Any]:
        """The method's quantizer on the CPU."""
        job = make_job(folder, self.method)
        made: Quantizer[Any] = resolve(selection.method.quantizer)(
            selection.config, device=torch.device("cpu"), kernels=job.kernels
        )
        return made

    @pytest.fixture
    def codec(self, selection: Selection) -> Codec[Any]:
        """The method's codec."""
        made: Codec[Any] = resolve(selection.method.codec)(selection.config)
        return made

    def form(self, quantizer: Quantizer[Any], shape: tuple[int, int], seed: int = 0) -> Form | None:
        """A quantized random matrix, or None where the method refuses the shape with findings."""
        if any(item.severity.value == "error" for item in quantizer.check(make_target(*shape))):
            return None
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
        return quantizer.quantize(make_target(*shape), _Matrix(weight))

    # -- registration --------------------------------------------------------------------------

    def test_the_plugin_is_ok(self, host: Host, selection: Selection) -> None:
        assert host.plugins[selection.plugin].status is Status.OK

    def test_every_import_string_resolves(self, selection: Selection) -> None:
        method = selection.method
        for reference in (method.config, method.quantizer, method.codec, method.linear):
            if reference is not None:
                resolve(reference)

    def test_registration_imports_nothing_heavy(self, host: Host, selection: Selection) -> None:
        entry = host.plugins[selection.plugin].entry
        code = f"import sys, {entry}; print([name for name in {HEAVY!r} if name in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"

    def test_it_declares_some_way_in_and_some_device(self, selection: Selection) -> None:
        able = selection.method.capabilities
        assert able.on_the_fly or able.calibrated or able.prequantized
        assert "cpu" in able.devices, "every method loads, runs and saves on a CPU"

    # -- configuration -------------------------------------------------------------------------

    def test_the_config_round_trips_byte_for_byte(self, folder: Path, selection: Selection) -> None:
        text = selection.config.to_json()
        _, again = configure(make_job(folder), json.loads(text), "checkpoint")
        assert again.to_json() == text

    def test_an_unknown_key_of_a_user_is_an_error(self, folder: Path) -> None:
        with pytest.raises(FindingsError) as caught:
            quantmill.plan(folder, {"method": self.method, self.bad_field: 1})
        assert any(item.code == "QM-CONFIG-001" for item in caught.value.findings)

    def test_an_unknown_key_of_a_checkpoint_is_kept(
        self, folder: Path, selection: Selection
    ) -> None:
        stored = {**selection.config.to_checkpoint(), self.bad_field: [1]}
        job = make_job(folder)
        _, config = configure(job, stored, "checkpoint")
        assert config.to_checkpoint()[self.bad_field] == [1]
        assert any(item.code == "QM-CONFIG-004" for item in job.findings)

    def test_it_has_a_schema(self) -> None:
        assert method_schema(self.method)["properties"]

    # -- planning and forms --------------------------------------------------------------------

    def test_planned_bytes_are_the_real_ones(
        self, quantizer: Quantizer[Any], codec: Codec[Any]
    ) -> None:
        for shape in self.shapes:
            form = self.form(quantizer, shape)
            if form is None:
                continue
            planned = quantizer.abstract(make_target(*shape), torch.bfloat16)
            assert planned.nbytes == form.nbytes
            sizes = [
                {name: tuple(tensor.shape) for name, tensor in codec.encode(item).items()}
                for item in (planned, form)
            ]
            fixed = [{n: s for n, s in item.items() if "quant_state" not in n} for item in sizes]
            assert fixed[0] == fixed[1]

    def test_dequantizing_is_close(self, quantizer: Quantizer[Any]) -> None:
        weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        weight = weight.to(torch.bfloat16)
        form = quantizer.quantize(make_target(64, 128), _Matrix(weight))
        error = (form.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm()
        assert 0 < error < self.max_error

    def test_row_blocks_do_not_change_a_bit(self, quantizer: Quantizer[Any]) -> None:
        class Whole(_Matrix):
            def row_blocks(self, multiple: int = 1) -> Any:
                yield 0, self._weight

        weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        pieces = quantizer.quantize(make_target(32, 96), _Matrix(weight))
        whole = quantizer.quantize(make_target(32, 96), Whole(weight))
        for name, tensor in pieces.tensors().items():
            assert torch.equal(tensor, whole.tensors()[name]), name

    def test_the_codec_undoes_itself(self, quantizer: Quantizer[Any], codec: Codec[Any]) -> None:
        for shape in self.shapes:
            form = self.form(quantizer, shape)
            if form is None:
                continue
            stored = {name: tensor.clone() for name, tensor in codec.encode(form).items()}
            assert set(stored) <= set(codec.suffixes)
            again = codec.decode(stored, make_target(*shape), torch.bfloat16)
            assert torch.equal(again.dequantize(torch.float32), form.dequantize(torch.float32))
            for name, tensor in codec.encode(again).items():
                assert torch.equal(tensor, codec.encode(form)[name]), name

    def test_nan_is_found_and_named(self, folder: Path) -> None:
        weight = torch.randn(64, 64).to(torch.bfloat16)
        weight[3, 5] = float("nan")
        name = "model.layers.1.self_attn.q_proj.weight"
        bad = write_tiny_llama(folder.parent / "nan", change={name: weight})
        with pytest.raises(QuantmillError) as caught:
            quantmill.quantize(bad, folder.parent / "out-nan", self.method)
        assert name in str(caught.value) and "[3, 5]" in str(caught.value)
        assert not (folder.parent / "out-nan").exists()

    # -- checkpoints ---------------------------------------------------------------------------

    def test_a_written_checkpoint_has_the_planned_size(self, folder: Path) -> None:
        out = folder.parent / "out"
        report = quantmill.quantize(folder, out, self.method)
        written = read_headers(open_source(out)).total_bytes
        assert abs(written - report.plan.totals["bytes_after"]) <= 0.02 * written

    def test_writing_twice_gives_the_same_bytes(self, folder: Path) -> None:
        files = []
        for name in ("one", "two"):
            quantmill.quantize(folder, folder.parent / name, self.method)
            files.append((folder.parent / name / "model.safetensors").read_bytes())
        assert files[0] == files[1]

    def test_the_source_is_not_touched_and_the_output_not_overwritten(self, folder: Path) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        quantmill.quantize(folder, folder.parent / "out", self.method)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(QuantmillError):
            quantmill.quantize(folder, folder.parent / "out", self.method)

    # -- live models (need a framework) --------------------------------------------------------

    @pytest.fixture
    def framework(self, host: Host) -> None:
        """Skip where no model source is installed."""
        if not host.model_sources:
            pytest.skip("no framework is installed")

    @pytest.fixture
    def ids(self) -> Tensor:
        """Two short sequences."""
        return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))

    def test_load_save_reload_is_bit_equal(
        self, framework: None, folder: Path, ids: Tensor
    ) -> None:
        model: Any = quantmill.load(folder, self.method)
        with torch.inference_mode():
            model(input_ids=ids)  # a forward may repack weights; saving must not notice
        state = model.state_dict()
        out = folder.parent / "out"
        quantmill.quantize(folder, out, self.method)
        reloaded: Any = quantmill.load(out)
        again = reloaded.state_dict()
        assert set(state) == set(again)
        for name, tensor in state.items():
            assert torch.equal(tensor, again[name]), name
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids).logits, reloaded(input_ids=ids).logits)

    def test_the_linear_agrees_with_the_reference(
        self, framework: None, folder: Path, ids: Tensor
    ) -> None:
        model: Any = quantmill.load(folder, self.method)
        reference: Any = quantmill.dequantize(quantmill.load(folder, self.method))
        with torch.inference_mode():
            ours = model(input_ids=ids).logits.float()
            theirs = reference(input_ids=ids).logits.float()
        assert (ours - theirs).norm() / theirs.norm() < 0.03

    def test_what_is_trainable_carries_gradients(
        self, framework: None, folder: Path, ids: Tensor, selection: Selection
    ) -> None:
        if not selection.method.capabilities.trainable:
            pytest.skip("declared as not trainable")
        model: Any = quantmill.load(folder, self.method)
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.float().square().mean().backward()
        assert inputs.grad is not None and torch.isfinite(inputs.grad).all()
        assert inputs.grad.abs().sum() > 0

    def test_user_skips_are_added_to_the_defaults(self, framework: None, folder: Path) -> None:
        plan = quantmill.plan(folder, self.method, skip=["model.layers.0.mlp.down_proj"])
        actions = {item.name: item.action for item in plan.modules}
        assert actions["model.layers.0.mlp.down_proj"] == "keep"
        assert actions["lm_head"] == "keep"
        assert actions["model.layers.1.mlp.down_proj"] == "quantize"

    def test_a_tied_head_stays_tied_and_float(self, framework: None, folder: Path) -> None:
        tied = write_tiny_llama(folder.parent / "tied", tied=True)
        model: Any = quantmill.load(tied, self.method, skip=["model.layers.0.mlp.up_proj"])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.bfloat16
