"""The plan: what happens to every module, in bytes, before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from quantmill.findings import Findings
from quantmill.targeting.types import Target

__all__ = ["OVERHEAD_BYTES", "ModulePlan", "Plan"]

OVERHEAD_BYTES: Final = 1 << 19
"""What every estimate allows for what is not counted: modules, threads, small tensors."""


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """The fate of one module. Bytes count its weight and bias with scales, zero points and all."""

    name: str
    kind: str
    shape: tuple[int, ...]
    action: str
    """``quantize``, ``keep`` or ``not-a-target``."""
    method: str | None
    """Label of the method."""
    form: str
    """The form in words, ``BF16`` for a kept one."""
    reason: str
    origin: str
    parameters: int
    bytes_before: int
    """In the source checkpoint."""
    bytes_after: int
    """In a written checkpoint."""
    bytes_memory: int
    """In the live model."""
    working_bytes: int = 0
    """While it is being made, beyond ``bytes_memory``."""
    forward_bytes: int = 0
    """While it computes, beyond ``bytes_memory``, its input and its output."""
    backward_bytes: int = 0
    """While gradients go back through it, beside those."""
    row_bytes: int = 0
    """While it computes, for each row of its input, beside that and its output."""
    encoding_bytes: int = 0
    """While its form becomes what a checkpoint holds, beyond that form."""
    building_bytes: int = 0
    """While its form becomes what it computes with, beyond ``bytes_memory``."""
    target: Target | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "target"}
        return {**data, "shape": list(self.shape)}


@dataclass(slots=True)
class Plan:
    """Decisions for every module of a model and what they cost."""

    source: str
    device: str
    dtype: str
    methods: Mapping[str, str]
    """Label to the method's name and options in words."""
    modules: list[ModulePlan]
    findings: Findings = field(default_factory=Findings)
    loading_bytes: int = 0
    """At the peak of loading, as the engine goes through the checkpoint."""
    writing_bytes: int = 0
    """At the peak of quantizing into a checkpoint without calibration."""
    calibrating_bytes: int = 0
    """What calibrating takes at once; zero where nothing is calibrated."""

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the modules; ``bits_per_weight`` is over the quantized ones, on disk.
        ``peak_bytes`` is that of loading, with all weights in memory; ``quantizing_bytes`` that of
        writing a checkpoint, which holds one module at a time, or what calibration holds."""
        quantized = [item for item in self.modules if item.action == "quantize"]
        weights = sum(item.parameters for item in quantized)
        bits = 8 * sum(item.bytes_after for item in quantized) / weights if weights else 0.0
        return {
            "parameters": sum(item.parameters for item in self.modules),
            "bytes_before": sum(item.bytes_before for item in self.modules),
            "bytes_after": sum(item.bytes_after for item in self.modules),
            "bytes_memory": sum(item.bytes_memory for item in self.modules),
            "peak_bytes": self.loading_bytes + OVERHEAD_BYTES,
            "quantizing_bytes": max(self.writing_bytes, self.calibrating_bytes) + OVERHEAD_BYTES,
            "bits_per_weight": bits,
            "quantized": len(quantized),
            "kept": sum(1 for item in self.modules if item.action == "keep"),
        }

    def __str__(self) -> str:
        totals = self.totals
        lines = [f"plan of {self.source}: {', '.join(self.methods.values()) or 'no method'}"]
        lines += [
            f"  {item.name}  {item.action}  {item.form}  {item.bytes_before:,} -> "
            f"{item.bytes_after:,} bytes  ({item.reason})"
            for item in self.modules
        ]
        lines.append(
            f"{totals['quantized']} quantized, {totals['kept']} kept,"
            f" {totals['bytes_before']:,} -> {totals['bytes_after']:,} bytes,"
            f" {totals['bits_per_weight']:.3f} bits per quantized weight"
        )
        return "\n".join([*lines, *(str(item) for item in self.findings)])

    def raise_errors(self) -> None:
        """Raise every finding of severity error."""
        self.findings.raise_errors()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "source": self.source,
            "device": self.device,
            "dtype": self.dtype,
            "methods": dict(self.methods),
            "totals": self.totals,
            "modules": [item.to_dict() for item in self.modules],
            "findings": self.findings.to_list(),
        }
