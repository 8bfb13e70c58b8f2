"""What the method can be told: the fields of ``quantization_config``, typed and frozen.

quantmill reads it strictly from users (an unknown key is an error with a suggestion) and
leniently from checkpoints (an unknown key is kept). Reading what was written must give the same
bytes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field
from quantmill.config import MethodConfig
from quantmill.targeting.dialects import from_transformers_skip
from quantmill.targeting.types import Rule

__all__ = ["ExampleConfig", "skip_rules"]


class ExampleConfig(MethodConfig):
    """Round-to-nearest quantization with one scale and one zero point for each group."""

    # The texts below the fields become descriptions in `quantmill schema example`.
    model_config = ConfigDict(use_attribute_docstrings=True)

    bits: Literal[4, 8] = 4
    """Bits of a code."""
    group_size: int = Field(64, ge=8, le=65536)
    """Consecutive weights of a row that share a scale; the last group of a row may be shorter."""
    symmetric: bool = False
    """Put the zero point into the middle of the range of codes."""
    modules_to_not_convert: list[str] | None = None
    """Modules to keep float, in addition to the defaults."""

    # A field that says how to compute, and not what is stored, may differ from the checkpoint's:
    # runtime_fields: ClassVar[frozenset[str]] = frozenset({"compute_dtype"})

    def to_checkpoint(self) -> dict[str, Any]:
        return {**super().to_checkpoint(), "quant_method": "example"}

    def keeping(self, modules: Sequence[str]) -> ExampleConfig:
        # quantmill calls this with what it kept float, so that others who read the file know.
        names = sorted({*(self.modules_to_not_convert or []), *modules})
        return self.model_copy(update={"modules_to_not_convert": names or None})


def skip_rules(config: ExampleConfig, origin: str) -> list[Rule]:
    """The skip list as targeting rules; quantmill's defaults stay in force beside it."""
    return from_transformers_skip(config.modules_to_not_convert or [], origin)
