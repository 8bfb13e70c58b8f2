"""What a family says of itself: its tensors, its config, and what llama.cpp can't express.

Tables and small functions, read in both directions: to load a file and to write one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from quantmill_gguf.architectures.moves import Move

if TYPE_CHECKING:
    from quantmill_gguf.architectures.keys import Keys
    from quantmill_gguf.container import GgufTensor

__all__ = ["DECODER", "Entry", "Family", "Field", "both", "experts", "layers"]

Config = Mapping[str, Any]
Tensors = Mapping[str, "GgufTensor"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of the model and the tensor that it is in a file."""

    parameter: str
    tensor: str
    move: Move = field(default_factory=Move)
    part: int | None = None
    """The parameter is one slice of the tensor: one expert's matrix, one head's norm."""

    @property
    def plain(self) -> bool:
        """The parameter's elements lie in the file as they do in the model, in one piece."""
        return self.move.plain


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
        used = move is not None and (local == "weight" or move.biases)
        made = move if used and move is not None else Move()
        yield Entry(f"{module}.{local}", f"{tensor}.{local}", made)


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
    config: Config,
    number: int,
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    module: str = "mlp.experts",
    prefix: str = "model.layers",
) -> Iterator[Entry]:
    """Entries of ``number`` experts in every block: files stack them, each kind of matrix in one
    tensor; to transformers each matrix has a name (``leaves``: of gate, up and down)."""
    for index in range(int(config["num_hidden_layers"])):
        for part, leaf in zip(("gate", "up", "down"), leaves, strict=True):
            for local in ("weight", "bias"):
                tensor = f"blk.{index}.ffn_{part}_exps.{local}"
                for expert in range(number):
                    name = f"{prefix}.{index}.{module}.{expert}.{leaf}.{local}"
                    yield Entry(name, tensor, part=expert)


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

    def needs_head(self, config: Config) -> bool:
        """Whether a file without an output head would be another model, or none."""
        return self.needs_output

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
        count = config[self.layer_key]
        if count > len(tensors):
            raise keys.refuse("block_count", count, f"a number of blocks of {len(tensors)} tensors")
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
