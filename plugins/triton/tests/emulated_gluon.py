"""As much of Triton's Gluon as the kernel for Hopper takes, on the CPU and one program at a time.

Gluon has no interpreter. This one moves real data through real barriers: the warp that moves and
those that multiply are two threads, the copy engine fills boxes and zeros beyond the edges, and a
product reads shared memory only when it is waited for, so a place that is filled too early gives a
wrong sum. Layouts say nothing here: how threads share a tensor is the compiler's.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0
"""Seconds after which a barrier that nobody completes counts as a deadlock."""

_here = SimpleNamespace(program=(0, 0, 0), grid=(1, 1, 1))


class Values(torch.Tensor):
    """A tensor in registers."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Values:  # type: ignore[override]
        plain = self.as_subclass(torch.Tensor)
        return (plain.view(dtype) if bitcast else plain.to(dtype)).as_subclass(Values)


def _values(tensor: Tensor) -> Values:
    return tensor.as_subclass(Values)


class Pointer:
    """Addresses in a tensor of global memory."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    def to(self, dtype: torch.dtype) -> Any:
        return self.offset

    def places(self) -> Tensor:
        return torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()


class Barrier:
    """One of shared memory: a phase ends when all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.parity = 0
        self.count = self.missing = self.bytes = 0

    def update(self, arrivals: int, more: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += more
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.parity ^= 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.parity != phase, PATIENCE)
        assert done, "deadlock"


class Shared:
    """A tensor in shared memory, or barriers."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.memory.dtype
        return dtype

    def index(self, place: int) -> Any:
        part = self.memory[place]
        return part if isinstance(part, Barrier) else Shared(part)

    def load(self, layout: Any) -> Values:
        return _values(self.memory.clone())

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.memory.permute(order))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.memory.dtype
        return Shared(self.memory.view(shape))


class Running:
    """Products that tensor cores are at."""

    def __init__(self, start: Tensor, products: tuple[tuple[Tensor, Shared], ...] = ()) -> None:
        self.start, self.products = start, products

    def result(self) -> Values:
        total = self.start.as_subclass(torch.Tensor)
        for left, right in self.products:
            total = total + left.as_subclass(torch.Tensor).float() @ right.memory.float()
        return _values(total)


class Descriptor:
    """A tensor as the copy engine sees it."""

    def __init__(
        self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any
    ) -> None:
        assert base.data_ptr() % 16 == 0
        assert all(stride * base.element_size() % 16 == 0 for stride in strides[:-1])
        assert strides[-1] == 1
        self.whole = torch.as_strided(base, shape, strides)
        self.block, self.layout, self.dtype = block, layout, base.dtype

    def box(self, corner: list[int]) -> Tensor:
        found = torch.zeros(self.block, dtype=self.dtype)
        sizes = [
            max(0, min(size, whole - start))
            for size, whole, start in zip(self.block, self.whole.shape, corner, strict=True)
        ]
        inside = tuple(slice(0, size) for size in sizes)
        there = tuple(slice(at, at + n) for at, n in zip(corner, sizes, strict=True))
        found[inside] = self.whole[there]
        return found


class Function:
    """What ``gluon.jit`` gives: called by other such functions, or launched over a grid."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            for name in ("launch_pdl", "num_warps", "maxnreg"):
                options.pop(name)
            given = [
                Pointer(item.reshape(-1)) if isinstance(item, Tensor) else item for item in args
            ]
            _here.grid = (*grid, 1, 1)[:3]
            # Not in order: whoever comes last adds the parts.
            for program in reversed(list(itertools.product(*map(range, _here.grid)))):
                _here.program = program
                self.function(*given, **options)

        return launch


def _jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Function(function) if function is not None else _jit


def _assembly(
    text: str, constraints: str, args: list[Any], dtype: torch.dtype, is_pure: bool, pack: int
) -> Values | None:
    if "fma.rn" not in text:
        return None  # Fetching early, and waiting for kernels that are not there.
    half, top = (torch.bfloat16, 0x4300) if "bf16x2" in text else (torch.float16, 0x6400)
    assert hex(top)[2:] * 2 in text
    words, less, shift, mask = args
    assert mask == 0xF000F
    bits = (words.as_subclass(torch.Tensor).int() & 0xFFFF) >> shift & 15 | top
    exact = bits.to(torch.int16).view(half).float() + less.as_subclass(torch.Tensor).float()
    rounded = exact.to(half)
    assert torch.equal(rounded.float(), exact)
    return _values(rounded.view(torch.int16))


def _masked(pointer: Pointer, mask: Any) -> tuple[Tensor, Tensor]:
    places = pointer.places()
    inside = torch.ones_like(places, dtype=torch.bool)
    return places, inside if mask is None else inside & mask.as_subclass(torch.Tensor)


def _load(
    pointer: Pointer, mask: Any = None, other: float = 0.0, cache_modifier: str = ""
) -> Values:
    places, inside = _masked(pointer, mask)
    found = torch.full(places.shape, other, dtype=pointer.memory.dtype)
    found[inside] = pointer.memory[places[inside]]
    return _values(found)


def _store(pointer: Pointer, value: Values, mask: Any = None) -> None:
    places, inside = _masked(pointer, mask)
    assert value.dtype == pointer.memory.dtype
    pointer.memory[places[inside]] = value.as_subclass(torch.Tensor)[inside]


def _swap(pointer: Pointer, new: Callable[[int], int]) -> int:
    place = int(pointer.places())
    old = int(pointer.memory[place])
    pointer.memory[place] = new(old)
    return old


def _copy(descriptor: Descriptor, corner: list[int], barrier: Barrier, result: Shared) -> None:
    result.memory.copy_(descriptor.box(corner))
    barrier.update(0, -result.memory.numel() * result.memory.element_size())


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _specialize(
    parts: list[tuple[Function, tuple[Any, ...]]], warps: list[int], registers: list[int]
) -> Any:
    (main, main_args), *others = parts
    failed: list[BaseException] = []

    def run(function: Function, args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except BaseException as error:  # noqa: BLE001 shown by the thread that waits
            failed.append(error)

    threads = [threading.Thread(target=run, args=part) for part in others]
    for thread in threads:
        thread.start()
    found = main(*main_args)
    for thread in threads:
        thread.join()
    assert not failed, failed
    return found


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    if layout == "barriers":
        return Shared([Barrier() for _ in range(shape[0])])
    # NaN, or nonsense: nothing is there before it came.
    fill = float("nan") if dtype.is_floating_point else -1
    return Shared(torch.full(shape, fill, dtype=dtype))


def _minimum(one: Any, two: Any) -> Any:
    return one.clamp(max=two) if isinstance(one, Tensor) else min(one, two)


def _layout(*args: Any, **options: Any) -> str:
    return "layout"


def modules() -> dict[str, ModuleType]:
    """The modules of Triton that stand in ``sys.modules`` meanwhile."""
    language = ModuleType("triton.experimental.gluon.language")
    for name in ("int16", "int32", "int64", "float16", "bfloat16", "float32"):
        setattr(language, name, getattr(torch, name))
    for name in (
        *("NVMMASharedLayout", "SwizzledSharedLayout", "BlockedLayout"),
        *("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout"),
    ):
        setattr(language, name, _layout)
    vars(language).update(
        constexpr=lambda value: value,
        static_range=range,
        program_id=lambda axis: _here.program[axis],
        num_programs=lambda axis: _here.grid[axis],
        arange=lambda start, stop, layout: _values(torch.arange(start, stop)),
        zeros=lambda shape, dtype, layout: _values(torch.zeros(shape, dtype=dtype)),
        expand_dims=lambda tensor, axis: tensor.unsqueeze(axis),
        convert_layout=lambda tensor, layout: tensor,
        minimum=_minimum,
        where=lambda condition, one, two: one if condition else two,
        inline_asm_elementwise=_assembly,
        load=_load,
        store=_store,
        atomic_add=lambda pointer, value, sem: _swap(pointer, lambda old: old + value),
        atomic_xchg=lambda pointer, value, sem: _swap(pointer, lambda old: value),
        allocate_shared_memory=_allocate,
        shared_memory_descriptor=Shared,
        thread_barrier=lambda: None,
        warp_specialize=_specialize,
    )
    hopper = ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    vars(hopper).update(
        mbarrier=SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=_init,
            expect=lambda barrier, size: barrier.update(1, size),
            wait=lambda barrier, phase: barrier.wait(phase),
            arrive=lambda barrier, count, pred: barrier.update(count, 0) if pred else None,
        ),
        tma=SimpleNamespace(async_copy_global_to_shared=_copy),
        warpgroup_mma_init=Running,
        warpgroup_mma=_multiply,
        warpgroup_mma_wait=lambda pending, deps: deps[0].result(),
    )
    host = ModuleType("triton.experimental.gluon.nvidia.hopper")
    vars(host).update(TensorDescriptor=Descriptor)
    gluon = ModuleType("triton.experimental.gluon")
    vars(gluon).update(jit=_jit, language=language)
    found = {module.__name__: module for module in (gluon, language, hopper, host)}
    for name in ("triton", "triton.experimental"):
        found[name] = ModuleType(name)
    for name in ("gluon.language.nvidia", "gluon.nvidia"):
        found[f"triton.experimental.{name}"] = ModuleType(name)
    return found


def _multiply(
    left: Values, right: Shared, start: Any, use_acc: bool = True, is_async: bool = False
) -> Running:
    if isinstance(start, Running):
        return Running(start.start, (*start.products, (left, right)))
    return Running(start if use_acc else torch.zeros_like(start), ((left, right),))


@contextmanager
def emulated(places: dict[str, ModuleType]) -> Iterator[None]:
    """With these modules in ``sys.modules``, and what imports them imported anew."""
    ours = ("quantmill_triton.hopper", "quantmill_triton.hopper_kernel")
    stand_ins = modules()
    before = {name: places.pop(name, None) for name in (*ours, *stand_ins)}
    places.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            places.pop(name, None)
            if module is not None:
                places[name] = module
