"""One group of a config: how weights and activations of its targets are quantized.

Field names and defaults are those of compressed-tensors 0.20 (``QuantizationArgs`` and
``QuantizationScheme``).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["NAMED", "Args", "Scheme", "args", "scheme"]

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"]


class Args(BaseModel):
    """How one kind of tensor is quantized."""

    # Keys of later versions are kept for a round trip; users' keys are checked by the config.
    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    num_bits: int = Field(8, ge=1, le=16)
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = Field(None, ge=-1)
    strategy: Strategy | None = None
    block_structure: list[int] | str | None = None
    """Rows and columns of a block."""
    dynamic: bool | Literal["local"] = False
    """Scales are taken from each input and not stored."""
    actorder: Any = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: dict[str, Any] | None = None

    @field_validator("type", "strategy", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> Args:
        if self.means in ("group", "tensor_group") and not (self.group_size or 0) > 0:
            raise ValueError(f"strategy {self.means} needs a group_size above 0")
        if self.means == "block" and self.block is None:
            raise ValueError("strategy block needs block_structure, for example [128, 128]")
        return self

    @property
    def means(self) -> str:
        """The strategy, inferred from the group size where it is not named."""
        if self.strategy is not None:
            return self.strategy
        if self.group_size is None:
            return "tensor"
        return "group" if self.group_size > 0 else "channel"

    @property
    def block(self) -> tuple[int, int] | None:
        """``block_structure`` as two numbers; older files write it as ``128x128``."""
        value: Any = self.block_structure
        if isinstance(value, str):
            value = [int(part) for part in value.split("x") if part.isdigit()]
        if value is None or len(value) != 2 or min(value) < 1:
            return None
        return int(value[0]), int(value[1])

    @property
    def is_nvfp4(self) -> bool:
        """4-bit floats under scales of their own and one for all."""
        return self.type == "float" and self.num_bits == 4 and self.means == "tensor_group"

    @property
    def is_mx(self) -> bool:
        """Floats of which 32 share a power of two."""
        powers = str(self.scale_dtype).endswith("uint8")
        return self.type == "float" and self.group_size == 32 and powers

    @property
    def words(self) -> str:
        """For tables: ``int4, group 128, symmetric``."""
        size = f" {self.group_size}" if self.means == "group" else ""
        if self.block:
            size = f" {self.block[0]}x{self.block[1]}"
        kind = "" if self.type == "float" else ", symmetric" if self.symmetric else ", asymmetric"
        return f"{self.type}{self.num_bits}, {self.means}{size}{kind}"


class Scheme(BaseModel):
    """A config group."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    """Names, ``re:`` expressions or classes of modules; the class ``Linear`` if not set."""
    weights: Args | None = None
    input_activations: Args | None = None
    output_activations: Args | None = None
    format: str | None = None

    @property
    def stores_as(self) -> str:
        """The format: the one named, or the one that the peer and vLLM expect."""
        if self.format is not None:
            return self.format
        if self.weights is not None and self.weights.type == "float":
            powers = str(self.weights.scale_dtype).endswith("uint8")
            if self.weights.num_bits == 4:
                return f"{'mx' if self.weights.group_size == 32 else 'nv'}fp4-pack-quantized"
            return "mxfp8-quantized" if powers else "float-quantized"
        return "pack-quantized" if self.input_activations is None else "int-quantized"


def args(**changes: Any) -> dict[str, Any]:
    """The fields of :class:`Args` that the peer writes, with ``changes``."""
    plain: dict[str, Any] = {
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "strategy": "channel",
        "symmetric": True,
        "type": "int",
    }
    return {**plain, **changes}


def scheme(
    weights: dict[str, Any], inputs: dict[str, Any] | None = None, targets: Any = ("Linear",)
) -> dict[str, Any]:
    """A group that says everything that the peer writes, its format too."""
    made = {
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {**made, "format": Scheme.model_validate(made).stores_as}


_NV: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
_MX: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_TOKEN = {"strategy": "token", "dynamic": True}
_FLOAT = {"type": "float"}
_GROUP = {"num_bits": 4, "strategy": "group", "group_size": 128}

NAMED: dict[str, dict[str, Any]] = {
    "W8A16": scheme(args()),
    "W4A16": scheme(args(**_GROUP)),
    "W4A16_ASYM": scheme(args(**_GROUP, symmetric=False)),
    "W8A8": scheme(args(), args(**_TOKEN)),
    "INT8": scheme(args(), args(**_TOKEN)),
    "W4A8": scheme(args(**_GROUP), args(**_TOKEN)),
    "FP8_DYNAMIC": scheme(args(**_FLOAT), args(**_FLOAT, **_TOKEN)),
    "FP8_BLOCK": scheme(
        args(**_FLOAT, strategy="block", block_structure=[128, 128]),
        args(**_FLOAT, strategy="group", group_size=128, dynamic=True),
    ),
    "NVFP4A16": scheme(args(**_NV)),
    "MXFP4A16": scheme(args(**_MX)),
    "MXFP8A16": scheme(args(**{**_MX, "num_bits": 8})),
}
"""Groups that a config may name in place of writing them out (``{"W4A16": ["Linear"]}``)."""
