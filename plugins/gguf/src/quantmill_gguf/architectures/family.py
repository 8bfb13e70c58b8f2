"""What a family says of itself: its tensors, its config, and what llama.cpp can't express.

Tables and small functions, read in both directions: to load a file and to write one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from quantmill_gguf.architectures.moves import Move

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill_gguf.architectures.keys import Keys
    from quantmill_gguf.container import GgufTensor

__all__ = ["DECODER", "Entry", "Family", "Field", "Join", "both", "experts", "layers"]

Config = Mapping[str, Any]
Tensors = Mapping[str, "GgufTensor"]


@dataclass(frozen=True, slots=True)
class Join:
    """How several tensors of a file make one parameter: the axis is the parameter's.

    ``concat``: one after the other; ``interleave``: in turns; ``stack``: along a new first axis;
    ``pairs``: two and two one after the other, and those along a new first axis.
    """

    kind: str = "concat"
    axis: int = 0

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Of the parameter, or None when the tensors don't fit together."""
        first, axis = shapes[0], self.axis
        if self.kind == "pairs":
            alike = len(shapes) % 2 == 0 and all(item == first for item in shapes)
            return (len(shapes) // 2, 2 * first[0], *first[1:]) if alike and first else None
        if self.kind == "stack":
            return (len(shapes), *first) if all(item == first for item in shapes) else None
        others = [(*item[:axis], *item[axis + 1 :]) for item in shapes]
        if len(first) <= axis or any(item != others[0] for item in others):
            return None
        if self.kind == "interleave" and any(item != first for item in shapes):
            return None
        return (*first[:axis], sum(item[axis] for item in shapes), *first[axis + 1 :])

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The parameter; for quantized rows too."""
        import torch

        if self.kind == "concat":
            return torch.cat(tensors, dim=self.axis)
        if self.kind == "stack":
            return torch.stack(tensors)
        if self.kind == "pairs":
            wide = torch.stack(tensors)
            return wide.reshape(wide.shape[0] // 2, 2 * wide.shape[1], *wide.shape[2:])
        return torch.stack(tensors, dim=self.axis + 1).flatten(self.axis, self.axis + 1)

    def split(self, tensor: Tensor, count: int) -> list[Tensor]:
        """The inverse, of ``count`` equal parts."""
        if self.kind == "stack":
            return list(tensor.unbind(0))
        if self.kind == "concat":
            return list(tensor.chunk(count, dim=self.axis))
        wide = tensor.unflatten(self.axis, (-1, count))
        return list(wide.unbind(self.axis + 1))


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of the model and what it is in a file."""

    parameter: str
    tensors: tuple[str, ...]
    """Names in the file, in order."""
    move: Move = field(default_factory=Move)
    """Done to the parameter as a whole, after joining."""
    join: Join = field(default_factory=Join)
    part: int | None = None
    """The parameter is one slice of the tensor."""
    optional: bool = False
    """A file may lack it, and the model has it all the same: it is written only if it is there."""

    @property
    def plain(self) -> bool:
        """The parameter lies in the file as it is."""
        return len(self.tensors) == 1 and self.move.plain and self.part is None


@dataclass(frozen=True, slots=True)
class Field:
    """A key of the file, without the architecture's prefix, and of the config."""

    key: str
    name: str
    kind: str = "whole"
    """``whole``, ``real`` or ``flag``."""
    default: Any = None
    """Where the file lacks it; None: it must be there."""


DECODER: Final[dict[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Parts of a block under the names that most models have."""


def both(tensor: str, module: str, move: Move | None = None) -> Iterator[Entry]:
    """Entries of a module's weight and bias."""
    for local in ("weight", "bias"):
        made = move if move is not None else Move()
        yield Entry(f"{module}.{local}", (f"{tensor}.{local}",), made)


def layers(
    count: int,
    parts: Mapping[str, str],
    moves: Mapping[str, Move] | None = None,
    prefix: str = "model.layers",
    block: str = "blk",
) -> Iterator[Entry]:
    """Entries of ``count`` blocks; ``parts`` and ``moves`` are by name in the file."""
    for index in range(count):
        for tensor, module in parts.items():
            move = (moves or {}).get(tensor)
            yield from both(f"{block}.{index}.{tensor}", f"{prefix}.{index}.{module}", move)


def experts(
    count: int, module: str = "mlp.experts", prefix: str = "model.layers"
) -> Iterator[Entry]:
    """Entries of experts stacked into two parameters: gate and up, and down."""
    for index in range(count):
        tensor = f"blk.{index}.ffn"
        name = f"{prefix}.{index}.{module}"
        pair = (f"{tensor}_gate_exps.weight", f"{tensor}_up_exps.weight")
        yield Entry(f"{name}.gate_up_proj", pair, join=Join("concat", 1))
        yield Entry(f"{name}.down_proj", (f"{tensor}_down_exps.weight",))


class Family:
    """One architecture of llama.cpp. Instances hold nothing."""

    arch: ClassVar[str]
    """``general.architecture``."""
    model_types: ClassVar[tuple[str, ...]]
    """Of transformers; the first is what a file is loaded as."""
    cls: ClassVar[str]
    """Transformers' class."""
    top: ClassVar[Mapping[str, str]] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    parts: ClassVar[Mapping[str, str]] = DECODER
    prefix: ClassVar[str] = "model.layers"
    fields: ClassVar[tuple[Field, ...]] = ()
    layer_key: ClassVar[str] = "num_hidden_layers"
    norms: ClassVar[Move] = Move()
    """Done to every norm's weight."""
    needs_output: ClassVar[bool] = False
    """llama.cpp wants an output head of its own even where the embedding serves as one."""

    def moves(self, config: Config) -> Mapping[str, Move]:
        """By name of the part in the file."""
        return {}

    def entries(self, config: Config) -> Iterator[Entry]:
        """Every parameter that a model with this config may have."""
        moves = dict(self.moves(config))
        if type(self.norms) is not Move:
            names = [*self.parts, *self.top]
            moves.update({name: self.norms for name in names if name.endswith("norm")})
        for tensor, module in self.top.items():
            yield from both(tensor, module, moves.get(tensor))
        yield from layers(int(config[self.layer_key]), self.parts, moves, self.prefix)

    def class_of(self, config: Config) -> str:
        """The class that a config asks for."""
        return self.cls

    def older(self, config: Config, tensors: Tensors) -> Iterator[Entry]:
        """Entries of older layouts that this file has, in place of today's."""
        return iter(())

    # -- from a file ---------------------------------------------------------------------------

    def read(self, keys: Keys, tensors: Tensors) -> dict[str, Any]:
        """The config of transformers.

        Raises:
            QuantmillError: the metadata is not what it must be.
        """
        config: dict[str, Any] = {"model_type": self.model_types[0]}
        for item in self.fields:
            default = config.get(item.default) if isinstance(item.default, str) else item.default
            config[item.name] = keys.read(item.key, item.kind, default)
        config |= keys.common(tensors)
        self.complete(config, keys, tensors)
        config["architectures"] = [self.class_of(config)]
        return config

    def complete(self, config: dict[str, Any], keys: Keys, tensors: Tensors) -> None:
        """Add what the table of fields can't say."""

    # -- to a file -----------------------------------------------------------------------------

    def write(self, config: Config) -> dict[str, Any]:
        """Metadata without the architecture's prefix; numbers are Python's, so ``1.0`` is one."""
        found: dict[str, Any] = {}
        for item in self.fields:
            value = config.get(item.name)
            if value is None and isinstance(item.default, str):
                value = config.get(item.default)
            if value is None:
                value = item.default if not isinstance(item.default, str) else None
            if value is not None:
                found[item.key] = float(value) if item.kind == "real" else value
        return found

    def extra(self, config: Config) -> Mapping[str, list[float]]:
        """Tensors of float32 that come from the config."""
        return {}

    def problems(self, config: Config) -> Iterable[str]:
        """What of a config llama.cpp does not compute."""
        return ()
