"""What the parts of the conformance suite share: weights in memory, fixtures, tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch import Tensor, nn

import quantmill
from quantmill.api import make_job
from quantmill.architecture import HeaderArchitecture, open_architecture
from quantmill.backend import Codec, LinearFactory, Quantizer
from quantmill.findings import CODES, Finding, QuantmillError, Severity
from quantmill.forms import Form
from quantmill.host import Host, default_host
from quantmill.job import Job, Selection
from quantmill.registrations import Capabilities
from quantmill.stages.quantize import codec_of, factory_of, quantizer_of
from quantmill.stages.select import select
from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target
from quantmill.testing.fabricate import write_tiny_llama

__all__ = [
    "Conformance",
    "MatrixSource",
    "attempt",
    "errors_of",
    "make_target",
    "normal",
    "off",
    "same",
    "sound",
]

T = TypeVar("T")


class MatrixSource:
    """A weight in memory, as a :class:`quantmill.backend.WeightSource`.

    As strict as the contract allows: blocks are as small as ``rows``, all are handed out in one
    buffer, and that is spoilt when the next one is asked for. A later pass has the same buffer.
    """

    def __init__(self, weight: Tensor, name: str = "layer.weight", *, rows: int = 3) -> None:
        self.name, self.dtype, self.shape = name, weight.dtype, tuple(weight.shape)
        self._weight, self._rows = weight, rows
        self._spare: Tensor | None = None

    def tensor(self) -> Tensor:
        """The whole weight."""
        return self._weight.clone()

    def row_blocks(self, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Blocks of ``rows`` rows, or of the next multiple asked for."""
        step = max(multiple, self._rows // multiple * multiple)
        buffer, self._spare = self._spare, None
        if buffer is None or buffer.shape[0] < min(step, self.shape[0]):
            buffer = torch.empty_like(self._weight[:step])
        for start in range(0, self.shape[0], step):
            block = buffer[: min(step, self.shape[0] - start)]
            block.copy_(self._weight[start : start + step])
            yield start, block
            buffer.fill_(float("nan"))
        self._spare = buffer


def make_target(out_features: int, in_features: int) -> Target:
    """A linear target that belongs to no model."""
    info = ParameterInfo("layer.weight", (out_features, in_features), "BF16", ("layer.weight",))
    module = ModuleInfo("layer", "linear", "Linear", {"weight": info})
    return Target(module, "weight", "linear", out_features, in_features)


def sound(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, each with a declared code, a place, a cause and a fix."""
    found = list(findings)
    for item in found:
        assert item.code in CODES, f"{item.code} is not declared"
        assert item.where and item.cause and item.fix, f"{item.code} lacks where, cause or fix"
        assert "Traceback" not in item.cause
    return found


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """The errors among findings that are all sound."""
    return [item for item in sound(findings) if item.severity is Severity.ERROR]


def attempt(function: Callable[[], T]) -> tuple[T | None, list[Finding]]:
    """The result, or the errors that were found in its place. Other exceptions pass."""
    try:
        return function(), []
    except QuantmillError as error:
        found = errors_of(error.findings)
    assert found, "an error without a finding of severity error"
    return None, found


def off(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""

    def bits(tensor: Tensor) -> Tensor:
        # torch compares no 8-bit floats, and their NaN would differ from itself.
        narrow = tensor.is_floating_point() and tensor.element_size() == 1
        return tensor.contiguous().view(torch.uint8) if narrow else tensor

    return set(one) == set(other) and all(
        tensor.dtype == other[name].dtype and torch.equal(bits(tensor), bits(other[name]))
        for name, tensor in one.items()
    )


class Conformance:
    """The method under test, and what it may need: options, tolerances, shapes."""

    method: ClassVar[str]
    """A METHOD: short name, with options if needed."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Arguments that ``quantmill.quantize`` needs beside METHOD."""
    changes_float: ClassVar[bool] = False
    """It writes other norms and biases than it read, because it folds scales into them."""
    max_error: ClassVar[float] = 0.2
    """Most relative error of the Frobenius norm on normal weights."""
    max_linear_error: ClassVar[float] = 0.03
    """Most relative error of a linear's output and gradient against its dequantized weight."""
    working_slack: ClassVar[int] = 3 << 17
    """Bytes that ``Quantizer.working_bytes`` may be wrong by where 10 % are less."""
    moving_slack: ClassVar[int] = 5 << 17
    """Bytes by which encoding and decoding may take more than 1.15 times what the codec says."""
    shapes: ClassVar[tuple[tuple[int, int], ...]] = (
        (64, 128),
        (7, 65),
        (33, 96),
        (1, 3),
        (1, 64),
        (5, 1),
        (1, 1),
    )
    """Shapes ``(out, in)`` to quantize: odd ones, a row, a column. A shape that the method does
    not take must be an error finding of ``Quantizer.check``."""
    golden: ClassVar[Path | None] = None
    """A ``.safetensors`` file with a float matrix ``input`` and, under the names of the layout, the
    bytes that quantizing it gives: made by the method's first home, or kept from an earlier
    version."""
    bad_field: ClassVar[str] = "surely_not_a_field"
    value_sized: ClassVar[tuple[str, ...]] = ("quant_state",)
    """Parts of names of stored tensors whose length depends on values (JSON text)."""

    @pytest.fixture
    def host(self) -> Host:
        """The host with all installed plugins."""
        return default_host()

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A tiny float Llama."""
        return write_tiny_llama(tmp_path / "float")

    @pytest.fixture
    def job(self, folder: Path) -> Job:
        """A job with the method selected."""
        job = make_job(folder, self.method)
        select(job)
        return job

    @pytest.fixture
    def selection(self, job: Job) -> Selection:
        """The method with its config."""
        return next(iter(job.selections.values()))

    @pytest.fixture
    def able(self, selection: Selection) -> Capabilities:
        """What the method declares."""
        return selection.method.capabilities

    @pytest.fixture
    def quantizer(self, job: Job, selection: Selection, able: Capabilities) -> Quantizer[Any]:
        """The method's quantizer on the CPU; a calibrated one rounds without data here."""
        if not (able.on_the_fly or able.calibrated):
            pytest.skip("it does not quantize")
        return quantizer_of(job, selection)

    @pytest.fixture
    def codec(self, job: Job, selection: Selection) -> Codec[Any]:
        """The method's codec."""
        return codec_of(job, selection)

    @pytest.fixture
    def factory(self, job: Job, selection: Selection) -> LinearFactory[Any]:
        """The method's linears, or the core's."""
        return factory_of(job, selection)

    @pytest.fixture
    def framework(self, job: Job) -> None:
        """Skip where no installed framework builds a Llama."""
        if isinstance(open_architecture(job.host, job.headers), HeaderArchitecture):
            pytest.skip("no framework is installed")

    @pytest.fixture
    def written(self, folder: Path, able: Capabilities) -> Path:
        """The tiny Llama, quantized on disk."""
        self.needs_writing(able)
        return self.write(folder, folder.parent / "written")

    @pytest.fixture
    def ids(self) -> Tensor:
        """Two short sequences."""
        return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))

    def needs_writing(self, able: Capabilities) -> None:
        """Skip where the method can't make a checkpoint."""
        if not able.serialisable or not (able.on_the_fly or able.calibrated):
            pytest.skip("it does not write checkpoints")
        if able.calibrated and not able.on_the_fly and not default_host().model_sources:
            pytest.skip("calibration runs the model, and no framework is installed")

    def write(self, source: Path, output: Path) -> Path:
        """Quantize ``source`` into ``output``."""
        quantmill.quantize(source, output, self.method, **self.options)
        return output

    def live(self, source: Path, able: Capabilities, **options: Any) -> Any:
        """A live model of ``source``, quantized while loading; a method that only loads what is
        quantized already has none."""
        if not able.on_the_fly and not able.calibrated:
            pytest.skip("it does not quantize")
        return quantmill.load(source, self.method, **{**self.options, **options})

    def refused(self, quantizer: Quantizer[Any], shape: tuple[int, int]) -> bool:
        """Whether the method says that it does not take the shape."""
        return bool(errors_of(quantizer.check(make_target(*shape))))

    def form(
        self,
        quantizer: Quantizer[Any],
        shape: tuple[int, int] = (64, 128),
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Form:
        """A quantized random matrix."""
        return quantizer.quantize(make_target(*shape), MatrixSource(normal(shape, seed, dtype)))

    def taken(self, quantizer: Quantizer[Any]) -> list[tuple[int, int]]:
        """The shapes of :attr:`shapes` that the method takes, at least one."""
        found = [shape for shape in self.shapes if not self.refused(quantizer, shape)]
        assert found, "the method takes none of the shapes: set `shapes`"
        return found

    def linear(
        self,
        factory: LinearFactory[Any],
        form: Form,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> nn.Module:
        """The module for a form."""
        target = make_target(*form.shape)
        if not factory.covers(target):
            pytest.skip("it has no module for linears")
        return factory.build(target, form, bias, dtype).eval()


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers of the normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
