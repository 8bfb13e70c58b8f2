"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantmill.api import make_job, prepare
from quantmill.checkpoint.containers import container_of
from quantmill.findings import Findings, QuantmillError
from quantmill.host import Host

__all__ = ["Inspection", "inspect"]


@dataclass(slots=True)
class Inspection:
    """What a checkpoint holds, from its headers alone."""

    source: str
    kind: str
    quantization: dict[str, Any] | None
    tensors: list[dict[str, Any]]
    modules: list[dict[str, Any]]
    totals: dict[str, Any]
    findings: Findings
    metadata: dict[str, str] = field(default_factory=dict)
    """What the files say of themselves beside tensors."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "source": self.source,
            "kind": self.kind,
            "quantization": self.quantization,
            "tensors": self.tensors,
            "modules": self.modules,
            "totals": self.totals,
            "metadata": self.metadata,
            "findings": self.findings.to_list(),
        }


def inspect(source: str | Path, *, host: Host | None = None) -> Inspection:
    """A checkpoint's formats and tensors. Works for any readable checkpoint, known model or not."""
    job = make_job(source, None, host=host)
    container = container_of(source, job.host)
    modules: list[dict[str, Any]] = []
    stored = job.headers.config.get("quantization_config")
    if stored:
        try:
            modules = [
                {
                    "name": item.name,
                    "method": item.method,
                    "form": item.form,
                    "shape": list(item.shape),
                    "bytes": item.bytes_before,
                }
                for item in prepare(job).modules
            ]
        except QuantmillError as error:
            job.findings.extend(error.findings)
    tensors = [
        {
            "name": item.name,
            "dtype": item.dtype,
            "shape": list(item.shape),
            "bytes": item.nbytes,
            "file": item.file,
        }
        for item in job.headers.tensors.values()
    ]
    by_dtype: dict[str, int] = {}
    for item in job.headers.tensors.values():
        by_dtype[item.dtype] = by_dtype.get(item.dtype, 0) + item.nbytes
    return Inspection(
        source=job.headers.source.describe(),
        kind="safetensors" if container is None else container.name,
        metadata=dict(job.headers.metadata),
        quantization=dict(stored) if stored else None,
        tensors=tensors,
        modules=modules,
        totals={
            "tensors": len(tensors),
            "bytes": sum(by_dtype.values()),
            "bytes_by_dtype": by_dtype,
            "files": len(job.headers.files),
        },
        findings=job.findings,
    )
