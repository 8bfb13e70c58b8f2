"""What a backend implements: a quantizer, a codec and, optionally, a linear.

These are the abstract classes behind the import strings of a
:class:`~quantmill.registrations.Method`. A quantizer turns weights into a form; a codec maps that
form to the tensors of one disk layout, both ways; a linear factory makes the module that computes
with it. None of them knows the model, the checkpoint or the other stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from quantmill.calibration.block import Block
    from quantmill.checkpoint.headers import TensorHeader
    from quantmill.checkpoint.reader import TensorReader
    from quantmill.config import MethodConfig
    from quantmill.findings import Finding
    from quantmill.forms import Form
    from quantmill.job import Job, Selection
    from quantmill.kernels import KernelRegistry
    from quantmill.targeting.types import ModuleInfo, ParameterInfo, Target

__all__ = [
    "BlockCalibrator",
    "Codec",
    "ContainerWriter",
    "Fit",
    "LinearFactory",
    "NonFiniteWeight",
    "Quantizer",
    "WeightSource",
    "block_bytes",
]

_BLOCK_BYTES: Final = 4 << 20
"""Of a row block; two are in memory. So small, it stays in a processor's cache."""
_DEVICE_BLOCK_BYTES: Final = 32 << 20
"""The same for a GPU, to which each block costs some launches and a copy."""


def block_bytes(device: torch.device) -> int:
    """Bytes of a row block for a device."""
    return _DEVICE_BLOCK_BYTES if device.type == "cuda" else _BLOCK_BYTES


ConfigT = TypeVar("ConfigT", bound="MethodConfig")


class WeightSource(Protocol):
    """A float weight that streams: ``[out, in]``, or ``[experts, out, in]`` for stacked ones."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """The whole weight. Costs its full size: prefer :meth:`row_blocks`."""
        ...

    def row_blocks(self, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """``(first row, rows [n, in])`` in order, ``n`` a multiple of ``multiple`` but at the end.

        Each block is valid until the next one is asked for.
        """
        ...


class NonFiniteWeight(Exception):
    """Raised by a quantizer that met NaN or infinity; the engine names the element and decides,
    by the job's policy, whether that ends the job or keeps the module float."""

    def __init__(self, name: str, index: int) -> None:
        """``index`` counts elements of the ``[out, in]`` weight ``name`` in row-major order."""
        super().__init__(name, index)
        self.name = name
        self.index = index

    def cause(self, shape: tuple[int, ...]) -> str:
        """Where in a weight of ``shape`` it is, in words."""
        where, rest = [], self.index
        for size in reversed(shape):
            where.append(rest % size)
            rest //= size
        return f"element {list(reversed(where))} of {self.name} is NaN or infinite"


class Quantizer(ABC, Generic[ConfigT]):
    """Turns float weights into forms."""

    def __init__(self, config: ConfigT, *, device: torch.device, kernels: KernelRegistry) -> None:
        self.config = config
        self.device = device
        self.kernels = kernels

    @abstractmethod
    def abstract(self, target: Target, dtype: torch.dtype) -> Form:
        """The form this target will have, on the meta device: exact bytes without data."""

    @abstractmethod
    def quantize(self, target: Target, weight: WeightSource) -> Form:
        """Quantize one weight; the form lives on ``self.device``.

        Raises:
            NonFiniteWeight: the weight holds NaN or infinity.
            QuantmillError: the weight can't be quantized for another reason, naming it.
        """

    def check(self, target: Target) -> Iterable[Finding]:
        """Findings about this target's shape; called while planning."""
        return ()

    def working_bytes(self, target: Target, dtype: torch.dtype) -> int:
        """Memory used while quantizing ``target``, beyond the form and the row buffers."""
        return 0

    def block_weights(self, target: Target, dtype: torch.dtype) -> int:
        """Weights of a row block of ``target``, stored in ``dtype``: what :meth:`working_bytes` of
        a quantizer that goes by row blocks is a multiple of."""
        return min(target.weights, block_bytes(self.device) // dtype.itemsize)


class BlockCalibrator(ABC, Generic[ConfigT]):
    """Quantizes the targets of a block with the inputs they really get."""

    def __init__(
        self, config: ConfigT, *, device: torch.device, kernels: KernelRegistry, seed: int = 0
    ) -> None:
        self.config = config
        self.device = device
        self.kernels = kernels
        self.seed = seed

    @abstractmethod
    def calibrate(self, block: Block) -> None:
        """Give every target of ``block`` its form with :meth:`Block.put`. The engine has seen to
        it that all their weights are finite."""

    def exact_inputs(self, config: ConfigT) -> bool:
        """Whether a target with this config asks for :attr:`Moments.cross`: each block then runs
        once more, on what the float model's blocks before it give."""
        return False

    def working_bytes(self, targets: Sequence[Target]) -> int:
        """Memory used while quantizing a block of ``targets``, beyond its weights, its inputs and
        what it computes of them: here a float32 matrix of the widest input's moments and some
        copies of the largest weight."""
        widest = max(target.in_features for target in targets)
        return 4 * widest**2 + 12 * max(target.weights for target in targets)


@dataclass(frozen=True, slots=True)
class Fit:
    """A form in another layout, with exactly the same values."""

    form: Form
    """As the layout's :meth:`Codec.encode` takes it. Without data where the given one has none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the layout's config, by the names that users give, under which it lies so."""
    unless: tuple[str, ...] = ()
    """For a form without data: what only data can tell, and what would rule the answer out."""
    notes: tuple[str, ...] = ()
    """What is different although the values are the same (wider codes, repeated scales)."""


class Codec(ABC, Generic[ConfigT]):
    """Maps a form to and from the tensors of one disk layout, bit for bit."""

    suffixes: ClassVar[tuple[str, ...]]
    """Names of all tensors of a module in this layout, relative to it (``weight.absmax``)."""
    stacked: ClassVar[str] = "stacked"
    """How stacked experts lie on disk: ``stacked`` (one tensor) or ``per-expert`` names."""
    note_bytes: ClassVar[int] = 0
    """Bytes of ``__metadata__`` for a weight, about: room is kept for them in headers of files."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def encode(self, form: Form) -> dict[str, Tensor]:
        """Tensors to write, by name relative to the module. Works on the meta device too."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], target: Target, dtype: torch.dtype) -> Form:
        """The form that ``tensors`` hold. Takes over the tensors without a copy where it can.

        Raises:
            QuantmillError: shapes, dtypes or metadata contradict each other.
        """

    def encoding_bytes(self, form: Form) -> int:
        """Bytes that :meth:`encode` takes, with its result: none where a layout is the form's own.
        ``form`` may be on the meta device."""
        return 0

    def decoding_bytes(self, form: Form) -> int:
        """The same of :meth:`decode`, ``form`` being its result."""
        return 0

    def annotate(self, form: Form, name: str) -> Mapping[str, str]:
        """Entries for the ``__metadata__`` of the files; ``name`` is the name of the weight of
        ``form`` there. What is under ``name`` comes back as :attr:`Target.note`."""
        return {}

    def metadata(self, tensors: Sequence[str], notes: Mapping[str, str]) -> Mapping[str, str]:
        """The ``__metadata__`` of every file of a checkpoint of ``tensors``; ``notes`` is what
        :meth:`annotate` said of the weights."""
        return notes

    @classmethod
    def fit(cls, form: Form, target: Target, wanted: Mapping[str, Any]) -> Fit:
        """A form of any layout in this one, with exactly the same values: what lossless
        conversion is made of. :mod:`quantmill.forms.fit` has the means.

        Args:
            form: of any plugin. On the meta device it tells what a dry run can know.
            target: what it is the weight of.
            wanted: fields of the config that are fixed (as its ``normalise`` leaves them); what
                is not among them follows the form.

        Raises:
            QuantmillError: values would change, or this layout has no place for such a form; the
                cause says why. That is the answer of a codec that does not implement it.
        """
        from quantmill.forms.convert import not_exact

        raise not_exact(target.name, f"{cls.__name__} does not say which forms fit into its layout")

    @abstractmethod
    def describe(
        self, headers: Mapping[str, TensorHeader], target: Target, dtype: torch.dtype
    ) -> Form | None:
        """The form on the meta device as the headers tell it, or None when these tensors are not
        of this layout (a float weight, for example)."""


class ContainerWriter(ABC):
    """Writes a whole model into one file: what a :class:`~quantmill.registrations.Container` names.

    It is a sink of the engine, and a context manager: whatever ends the context before
    :meth:`commit` leaves nothing behind.
    """

    def __init__(self, job: Job, path: Path, max_file_bytes: int | None = None) -> None:
        """``job.plan`` stands. A model of more than ``max_file_bytes`` is split over files, if
        the format knows how; None for one file."""
        self.job = job
        self.path = path
        self.max_file_bytes = max_file_bytes

    @classmethod
    def check(cls, job: Job) -> Iterable[Finding]:
        """Why the file can't hold what ``job.plan`` makes; called in validation."""
        return ()

    @classmethod
    def kept(cls, job: Job, module: ModuleInfo, parameter: ParameterInfo) -> tuple[str, int] | None:
        """Dtype (or the format's own name of a type) and bytes of a tensor that is not quantized;
        None where it is stored as it is in the source. Called while planning."""
        return None

    @classmethod
    def shared(cls, job: Job, target: Target) -> str | None:
        """The name of what ``target`` lies in with others, which then all have one form; None
        where it lies alone. Called with a planned job."""
        return None

    @abstractmethod
    def __enter__(self) -> Self:
        """Open the file under a temporary name."""

    @abstractmethod
    def __exit__(self, *exc: object) -> None:
        """Remove what was not committed."""

    @abstractmethod
    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        """Write a quantized target, with the module's bias if it has one."""

    @abstractmethod
    def put_tensor(
        self, module: ModuleInfo, parameter: ParameterInfo, reader: TensorReader
    ) -> None:
        """Write a tensor that stays float."""

    @abstractmethod
    def commit(self) -> list[Path]:
        """Finish; the files appear under their names and are returned.

        Raises:
            QuantmillError: something is missing, or it can't be written.
        """


class LinearFactory(ABC, Generic[ConfigT]):
    """Makes the modules that compute with a method's forms."""

    def __init__(
        self,
        config: ConfigT,
        codec: Codec[Any],
        kernels: KernelRegistry,
        *,
        device: str = "cpu",
        dtype: str = "bfloat16",
    ) -> None:
        """``device`` and ``dtype`` (of activations) are the job's: kernels depend on them."""
        self.config = config
        self.codec = codec
        self.kernels = kernels
        self.device = device
        self.dtype = dtype

    @abstractmethod
    def build(
        self, target: Target, form: Form, bias: Tensor | None, compute_dtype: torch.dtype
    ) -> nn.Module:
        """The module for ``target``. Its ``state_dict`` gives what the codec encodes."""

    def covers(self, target: Target) -> bool:
        """Whether :meth:`build` has a module for this kind of target. For others the engine lets
        the float parameter come out of the form at each forward."""
        return target.kind in ("linear", "conv1d")

    @abstractmethod
    def form_of(self, module: nn.Module) -> Form | None:
        """The exact form inside a module this factory made, or None if it made another kind."""

    def resident_bytes(self, form: Form) -> int:
        """Bytes the module keeps in memory for ``form``, which may be on the meta device."""
        return form.nbytes

    def building_bytes(self, form: Form) -> int:
        """Bytes that :meth:`build` needs beside what the module keeps: none, unless it makes
        something else of the form. ``form`` may be on the meta device."""
        return 0

    def forward_bytes(self, form: Form, dtype: torch.dtype) -> int:
        """Bytes that a forward pass over many rows needs beside its input and output: the float
        weight, unless what computes does without. ``form`` may be on the meta device."""
        rows, columns = form.shape[-2:]
        return int(rows * columns * dtype.itemsize)

    def backward_bytes(self, form: Form, dtype: torch.dtype) -> int:
        """Bytes that a backward pass, which gives the gradient of the input, needs beside that:
        the float weight. ``form`` may be on the meta device."""
        rows, columns = form.shape[-2:]
        return int(rows * columns * dtype.itemsize)

    def row_bytes(self, form: Form, dtype: torch.dtype) -> int:
        """Bytes that a forward pass needs for each row of its input, beside input and output:
        rounded activations, sums in another dtype. ``form`` may be on the meta device."""
        return 0
