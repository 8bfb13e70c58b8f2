"""Promises about the quantizer and the codec: weights to forms to stored tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantmill.backend import Codec, NonFiniteWeight, Quantizer
from quantmill.checkpoint.dtypes import code_of
from quantmill.checkpoint.headers import TensorHeader
from quantmill.findings import QuantmillError
from quantmill.forms import Form
from quantmill.registrations import Capabilities
from quantmill.testing.base import (
    Conformance,
    MatrixSource,
    attempt,
    make_target,
    normal,
    off,
    same,
    sound,
)
from quantmill.testing.peak import PeakBytes

__all__ = ["FormPromises", "damages", "headers_of"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def headers_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorHeader]:
    """What the headers of a file with these tensors say."""
    return {
        name: TensorHeader(
            name, code_of(item.dtype), tuple(item.shape), "model.safetensors", 0, item.nbytes
        )
        for name, item in tensors.items()
    }


def damages(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors with each in turn missing, alone, and cut to its first half."""
    found = {}
    for name, tensor in tensors.items():
        found[f"only {name}"] = {name: tensor}
        found[f"without {name}"] = {key: item for key, item in tensors.items() if key != name}
        whole = tensor.reshape(1) if tensor.ndim == 0 else tensor
        half = whole[: whole.shape[0] // 2].clone()
        found[f"half of {name}"] = {**tensors, name: half}
    return found


class FormPromises(Conformance):
    """Planned bytes are real, the same weight gives the same bits, the codec undoes itself."""

    def test_planned_forms_are_the_real_ones(
        self, quantizer: Quantizer[Any], codec: Codec[Any]
    ) -> None:
        for shape in self.taken(quantizer):
            form = self.form(quantizer, shape)
            planned = quantizer.abstract(make_target(*shape), torch.bfloat16)
            assert planned.nbytes == form.nbytes, shape
            assert planned.shape == form.shape == shape
            assert planned.kind == form.kind and planned.dtype == form.dtype
            assert dict(planned.traits()) == dict(form.traits()), shape
            real = form.tensors()
            for name, tensor in planned.tensors().items():
                assert tensor.is_meta, f"{name} takes memory in a plan"
                assert (tensor.shape, tensor.dtype) == (real[name].shape, real[name].dtype), name
            stored = codec.encode(form)
            for name, tensor in codec.encode(planned).items():
                if not any(part in name for part in self.value_sized):
                    assert tensor.shape == stored[name].shape, name

    def test_dequantizing_is_close(self, quantizer: Quantizer[Any]) -> None:
        for dtype in FLOATS:
            weight = normal((64, 128), dtype=dtype)
            form = self.form(quantizer, dtype=dtype)
            assert form.dtype == dtype and form.dequantize().dtype == dtype
            assert 0 < off(form.dequantize(torch.float32), weight) < self.max_error, dtype

    def test_unusual_weights_stay_finite_and_zeros_stay_zeros(
        self, quantizer: Quantizer[Any]
    ) -> None:
        outlier = normal((64, 128))
        outlier[5, 7] = 1e4
        cases = {
            "zeros": torch.zeros(64, 128, dtype=torch.bfloat16),
            "a constant": torch.full((64, 128), -0.5, dtype=torch.bfloat16),
            "tiny": (normal((64, 128)).float() * 1e-30).to(torch.bfloat16),
            "an outlier": outlier,
        }
        for name, weight in cases.items():
            form = quantizer.quantize(make_target(64, 128), MatrixSource(weight))
            values = form.dequantize(torch.float32)
            assert torch.isfinite(values).all(), name
            if name == "zeros":
                assert not values.any()

    def test_row_blocks_do_not_change_a_bit(self, quantizer: Quantizer[Any]) -> None:
        # The blocks are overwritten after use, so this also shows a block that was kept.
        for shape in self.taken(quantizer):
            weight, target = normal(shape, seed=3), make_target(*shape)
            whole = quantizer.quantize(target, MatrixSource(weight, rows=1000)).tensors()
            for rows in (1, 2, 3, 5, 8):
                pieces = quantizer.quantize(target, MatrixSource(weight, rows=rows)).tensors()
                assert same(pieces, whole), (shape, rows)

    def test_the_default_dtype_of_the_process_does_not_matter(
        self, quantizer: Quantizer[Any], codec: Codec[Any]
    ) -> None:
        # Training scripts set it, and other threads while they build a model.
        form, default = self.form(quantizer), torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            again = self.form(quantizer)
            decoded = codec.decode(codec.encode(again), make_target(64, 128), torch.bfloat16)
            planned = quantizer.abstract(make_target(64, 128), torch.bfloat16)
        finally:
            torch.set_default_dtype(default)
        assert same(again.tensors(), form.tensors())
        assert torch.equal(decoded.dequantize(torch.float32), form.dequantize(torch.float32))
        assert planned.nbytes == form.nbytes

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_the_first_value_that_is_not_finite_is_named(
        self, quantizer: Quantizer[Any], value: float
    ) -> None:
        for index in ((0, 0), (40, 17), (63, 127)):
            weight = normal((64, 128))
            weight[index] = weight[63, 127] = value
            with pytest.raises(NonFiniteWeight) as caught:
                quantizer.quantize(make_target(64, 128), MatrixSource(weight, "this.weight"))
            assert caught.value.name == "this.weight"
            assert caught.value.index == index[0] * 128 + index[1]

    def test_a_refused_shape_has_a_cause_and_a_fix(self, quantizer: Quantizer[Any]) -> None:
        for shape in (*self.shapes, (1024, 4096), (3, 100003)):
            sound(quantizer.check(make_target(*shape)))

    def test_the_codec_undoes_itself(
        self, quantizer: Quantizer[Any], codec: Codec[Any], tmp_path: Path
    ) -> None:
        for shape in self.taken(quantizer):
            form = self.form(quantizer, shape)
            stored = codec.encode(form)
            assert set(stored) <= set(codec.suffixes)
            save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "one.safetensors")
            read = load_file(tmp_path / "one.safetensors")
            before = {name: tensor.clone() for name, tensor in read.items()}
            again = codec.decode(read, make_target(*shape), torch.bfloat16)
            assert same(read, before), "decoding changed the tensors it was given"
            assert again.shape == form.shape and again.kind == form.kind
            assert torch.equal(again.dequantize(torch.float32), form.dequantize(torch.float32))
            assert same(codec.encode(again), stored), shape

    def test_headers_describe_the_form_that_is_decoded(
        self, quantizer: Quantizer[Any], codec: Codec[Any]
    ) -> None:
        for shape in self.taken(quantizer):
            stored, target = codec.encode(self.form(quantizer, shape)), make_target(*shape)
            described = codec.describe(headers_of(stored), target, torch.bfloat16)
            decoded = codec.decode(stored, target, torch.bfloat16)
            assert described is not None, shape
            assert all(tensor.is_meta for tensor in described.tensors().values())
            assert described.nbytes == decoded.nbytes, shape
            assert described.shape == decoded.shape and described.kind == decoded.kind
            assert dict(described.traits()) == dict(decoded.traits()), shape

    def test_float_weights_are_not_taken_for_quantized(self, codec: Codec[Any]) -> None:
        for dtype in FLOATS:
            headers = headers_of({"weight": torch.empty(64, 128, dtype=dtype, device="meta")})
            assert codec.describe(headers, make_target(64, 128), dtype) is None

    def test_damaged_tensors_are_an_error_and_never_another_weight(
        self, quantizer: Quantizer[Any], codec: Codec[Any]
    ) -> None:
        form = self.form(quantizer)
        target, stored = make_target(64, 128), codec.encode(form)
        for what, tensors in damages(stored).items():

            def read(tensors: dict[str, Tensor] = tensors) -> Form:
                codec.describe(headers_of(tensors), target, torch.bfloat16)
                return codec.decode(tensors, target, torch.bfloat16)

            again, _ = attempt(read)
            # A tensor that says nothing new may be missed; it may not change the weight.
            if again is not None:
                assert torch.equal(again.dequantize(), form.dequantize()), what

    def test_golden_bytes(self, quantizer: Quantizer[Any], codec: Codec[Any]) -> None:
        if self.golden is None:
            pytest.skip("no golden file is given: set `golden`")
        wanted = load_file(self.golden)
        weight = wanted.pop("input")
        target = make_target(*weight.shape)
        form = quantizer.quantize(target, MatrixSource(weight))
        assert same(codec.encode(form), wanted)
        decoded = codec.decode(wanted, target, weight.dtype)
        assert torch.equal(decoded.dequantize(), form.dequantize())

    def test_memory_beyond_the_form_does_not_grow_with_the_rows(
        self, quantizer: Quantizer[Any]
    ) -> None:
        shapes = ((512, 512), (1536, 512))
        if any(self.refused(quantizer, shape) for shape in shapes):
            pytest.skip("it takes no matrix of that size")
        beyond = []
        for shape in shapes:
            target, source = make_target(*shape), MatrixSource(normal(shape), rows=64)
            quantizer.quantize(target, source)  # tables that are made once
            with PeakBytes() as peak:
                form = quantizer.quantize(target, source)
            # What it needs of the whole weight, it says.
            said = quantizer.working_bytes(target, torch.bfloat16)
            beyond.append(peak.bytes - form.nbytes - said)
        assert beyond[1] - beyond[0] < 1024 * 512 // 4

    def test_working_memory_is_what_the_quantizer_says(
        self, quantizer: Quantizer[Any], able: Capabilities
    ) -> None:
        if not able.on_the_fly:
            pytest.skip("what is calibrated is said by the calibrator")
        shape = (512, 1024)
        if self.refused(quantizer, shape):
            pytest.skip("it takes no matrix of that size")
        weight = normal(shape, dtype=torch.bfloat16)
        target, source = make_target(*shape), MatrixSource(weight, rows=shape[0])
        quantizer.quantize(target, source)  # tables that are made once, and the source's buffer
        with PeakBytes() as peak:
            form = quantizer.quantize(target, source)
        said = quantizer.working_bytes(target, source.dtype)
        assert said == pytest.approx(peak.bytes - form.nbytes, rel=0.1, abs=self.working_slack)

    def test_memory_of_encoding_is_what_the_codec_says(
        self, quantizer: Quantizer[Any], codec: Codec[Any]
    ) -> None:
        shape = (512, 1024)
        if self.refused(quantizer, shape):
            pytest.skip("it takes no matrix of that size")
        target, weight = make_target(*shape), normal(shape, dtype=torch.bfloat16)
        form = quantizer.quantize(target, MatrixSource(weight, rows=shape[0]))
        stored = codec.encode(form)
        codec.decode(stored, target, weight.dtype)  # tables that are made once
        with PeakBytes() as peak:
            codec.encode(form)
        assert peak.bytes < 1.15 * codec.encoding_bytes(form) + self.moving_slack
        with PeakBytes() as peak:
            codec.decode(stored, target, weight.dtype)
        assert peak.bytes < 1.15 * codec.decoding_bytes(form) + self.moving_slack

    def test_tensors_of_another_shape_are_refused(
        self, quantizer: Quantizer[Any], codec: Codec[Any]
    ) -> None:
        stored = codec.encode(self.form(quantizer))
        for shape in ((32, 128), (64, 64), (128, 128), (64, 256)):
            with pytest.raises(QuantmillError) as caught:
                codec.decode(stored, make_target(*shape), torch.bfloat16)
            assert "layer" in str(caught.value), "the message does not name the module"
            sound(caught.value.findings)
