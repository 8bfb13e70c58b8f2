"""``qmodel.pt``, what hqq's own ``save_quantized`` writes, read without unpickling it.

The file is a zip archive as ``torch.save`` makes it: ``data.pkl`` describes a dict ``{module: state
dict}``, and each storage lies uncompressed in a member of its own. The description's opcodes are
walked as data: dicts, numbers, texts and the few names that stand for tensors, dtypes and sizes
have a meaning here, anything else is refused, and nothing is imported or called. Weights are then
read from their places in the file, like those of any checkpoint.

Source: Python's pickle protocol 2 (``pickletools``), PyTorch's notes on serialization, and
``hqq.core.quantize.HQQLinear.state_dict``.
"""

from __future__ import annotations

import json
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

from quantmill.checkpoint.files import FolderSource, read_json
from quantmill.checkpoint.headers import CheckpointHeaders, TensorHeader
from quantmill.findings import Finding, FindingsError, QuantmillError, declare
from quantmill_hqq.detect import SETTINGS, stored_config

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read"]

DAMAGED = declare("QM-HQQ-003", "hqq's qmodel.pt can't be read")

_MOST: Final = 64 << 20
"""Bytes of a description; a model of a thousand linears needs less than one MiB."""
_STORAGES: Final = {
    "BFloat16Storage": ("BF16", 2),
    "HalfStorage": ("F16", 2),
    "FloatStorage": ("F32", 4),
    "ByteStorage": ("U8", 1),
    "CharStorage": ("I8", 1),
    "IntStorage": ("I32", 4),
    "LongStorage": ("I64", 8),
    "BoolStorage": ("BOOL", 1),
}
# Settings of a quantization that stores its scales or zero points quantized too.
_NESTED: Final = ("quant_scale", "quant_zero")


@dataclass(frozen=True, slots=True)
class _Name:
    """A global of the description: a word, never imported."""

    module: str
    word: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    size: int
    key: str


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor: consecutive elements of a storage."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]


class _Refused(ValueError):
    pass


def read(path: Path) -> CheckpointHeaders:
    """The headers of a folder by its ``qmodel.pt``.

    Raises:
        QuantmillError: the file is damaged, or holds what a checkpoint of hqq does not.
    """
    folder = FolderSource(path.parent)
    problems: list[Finding] = []
    config = read_json(folder, "config.json", problems) or {}
    generation = read_json(folder, "generation_config.json", problems)
    if problems:
        raise FindingsError(problems)
    try:
        with path.open("rb") as file, zipfile.ZipFile(path) as archive:
            tensors, settings = _modules(path, file, archive)
    except (zipfile.BadZipFile, OSError, struct.error, _Refused, IndexError, KeyError) as error:
        _fail(path.name, str(error)[:200] or type(error).__name__)
    except (ValueError, TypeError, RecursionError) as error:
        _fail(path.name, f"its description can't be read: {str(error)[:160]}")
    if settings is not None and "quantization_config" not in config:
        config["quantization_config"] = stored_config(settings)
    files = {path.name: path.stat().st_size}
    return CheckpointHeaders(tensors, {}, files, config, generation, folder)


def _fail(file: str, cause: str) -> NoReturn:
    fix = "get it again from its source, or write it anew with hqq's save_to_safetensors"
    raise QuantmillError(DAMAGED(file, cause, fix))


def _modules(
    path: Path, file: IO[bytes], archive: zipfile.ZipFile
) -> tuple[dict[str, TensorHeader], dict[str, Any] | None]:
    members = {item.filename: item for item in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused(f"it has {len(roots)} descriptions, not one")
    root = roots[0]
    order = members.get(f"{root}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise _Refused("its numbers are big-endian")
    if members[f"{root}data.pkl"].file_size > _MOST:
        raise _Refused("its description is absurdly long")
    tree = _described(archive.read(f"{root}data.pkl"))
    if not isinstance(tree, dict):
        raise _Refused("it holds no dict of modules")
    places = _Places(path, file, members, root)
    tensors: dict[str, TensorHeader] = {}
    settings = None
    for module, state in tree.items():
        if not isinstance(module, str) or not isinstance(state, dict):
            raise _Refused("it holds something else than the state of modules")
        if "W_q" in state:
            _check(module, state)
            settings = settings or {key: state[key] for key in SETTINGS}
        for name, value in state.items():
            if isinstance(value, _Stored):
                full = f"{module}.{name}"
                tensors[full] = places.header(full, value)
    return tensors, settings


def _check(module: str, state: Mapping[str, Any]) -> None:
    """What a module's settings say must be what its tensors are."""
    for name in ("W_q", "scale", "zero"):
        if not isinstance(state.get(name), _Stored):
            raise _Refused(f"{module} has no tensor {name}")
    if any(state.get(name) for name in _NESTED):
        raise _Refused(
            f"{module} stores its scales or zero points quantized, as old versions of hqq did"
        )
    shape = state.get("shape")
    size, axis, nbits = (state.get(name) for name in ("group_size", "axis", "nbits"))
    if not isinstance(shape, tuple) or len(shape) != 2 or axis not in (0, 1):
        raise _Refused(f"{module} has shape {shape!r:.60} and axis {axis!r:.20}")
    if type(nbits) not in (int, float) or not isinstance(size, int | None):
        raise _Refused(f"{module} has nbits {nbits!r:.20} and group_size {size!r:.20}")
    wanted = math.prod(shape) // (size or shape[1 if axis == 1 else 0] or 1)
    if math.prod(state["scale"].shape) != wanted:
        raise _Refused(
            f"{module} has {math.prod(state['scale'].shape)} scales, its shape and group size make"
            f" {wanted}"
        )


class _Places:
    """Where storages lie in the file."""

    def __init__(
        self, path: Path, file: IO[bytes], members: Mapping[str, zipfile.ZipInfo], root: str
    ) -> None:
        self.name, self.members, self.root = path.name, members, root
        self.file = file
        self.size = path.stat().st_size
        self.starts: dict[str, int] = {}

    def start(self, storage: _Storage) -> int:
        found = self.starts.get(storage.key)
        if found is not None:
            return found
        member = self.members.get(f"{self.root}data/{storage.key}")
        if member is None:
            raise _Refused(f"its storage {storage.key!r:.40} is missing")
        if member.compress_type != zipfile.ZIP_STORED:
            raise _Refused("its storages are compressed")
        if member.file_size != storage.size * _STORAGES[storage.kind][1]:
            raise _Refused(f"its storage {storage.key} has another size than its description says")
        # The local header repeats the name and may have another extra field than the directory.
        self.file.seek(member.header_offset)
        head = self.file.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise _Refused("its directory points to no member")
        name, extra = struct.unpack("<HH", head[26:30])
        start: int = member.header_offset + 30 + name + extra
        if start + member.file_size > self.size:
            raise _Refused("it is cut short")
        self.starts[storage.key] = start
        return start

    def header(self, name: str, item: _Stored) -> TensorHeader:
        code, width = _STORAGES[item.storage.kind]
        count = math.prod(item.shape)
        if item.start < 0 or item.start + count > item.storage.size:
            raise _Refused(f"{name} reaches beyond its storage")
        start = self.start(item.storage) + item.start * width
        return TensorHeader(name, code, item.shape, self.name, start, start + count * width)


_MARK: Final = object()


def _described(data: bytes) -> Any:
    """The value that a description stands for."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        items: list[Any] = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "NONE":
                stack.append(None)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                module, _, word = argument.partition(" ")
                stack.append(_Name(module, word))
            case "STACK_GLOBAL":
                word, module = stack.pop(), stack.pop()
                stack.append(_Name(str(module), str(word)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _dict(stack[-1])[key] = value
            case "SETITEMS":
                items = since_mark()
                _dict(stack[-1]).update(zip(items[::2], items[1::2], strict=True))
            case "STOP":
                return stack.pop()
            case other:
                raise _Refused(f"its description does what no checkpoint needs ({other})")
    raise _Refused("its description has no end")


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _Refused("its description sets items of something else than a dict")
    return value


def _storage(value: Any) -> _Storage:
    match value:
        case ("storage", _Name("torch", kind), str(key), str(), int(size)) if kind in _STORAGES:
            return _Storage(kind, size, key)
    raise _Refused(f"it names a storage that is none: {value!r:.120}")


def _made(name: Any, arguments: Any) -> Any:
    """What a call in the description stands for; nothing is called."""
    match name, arguments:
        case _Name("collections", "OrderedDict"), ():
            return {}
        case _Name("torch", "Size"), (tuple(shape),):
            return shape
        case _Name("torch._utils", "_rebuild_parameter"), (_Stored() as stored, *_):
            return stored
        case (
            _Name("torch._utils", "_rebuild_tensor_v2"),
            (_Storage() as storage, int(start), tuple(shape), tuple(stride), *_),
        ):
            if not all(type(size) is int and size >= 0 for size in shape):
                raise _Refused(f"it has a tensor of shape {shape!r:.80}")
            dense, step = [], 1
            for size in reversed(shape):
                dense.append(step)
                step *= size
            along = zip(shape, stride, reversed(dense), strict=True)
            if any(size > 1 and found != wanted for size, found, wanted in along):
                raise _Refused("it has a tensor that does not lie in one piece")
            return _Stored(storage, start, shape)
    words = json.dumps(f"{name.module}.{name.word}" if isinstance(name, _Name) else repr(name))
    raise _Refused(f"its description calls {words[:120]}, which no checkpoint of hqq needs")
