"""Which installed methods fit a model into a given memory, from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmill.api import make_job, prepare
from quantmill.findings import QuantmillError
from quantmill.host import Host, default_host

__all__ = ["Candidate", "cache_bytes", "fits"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method and whether a model fits with it."""

    name: str
    fits: bool
    bytes: int
    peak: int
    bits_per_weight: float
    loss_bits: float
    """Bits of each code that are given up against 16."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return dataclasses.asdict(self)


def fits(
    source: str | Path,
    memory: int,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    host: Host | None = None,
    context: int = 2048,
) -> list[Candidate]:
    """Every installed method for ``memory`` bytes: those that fit first, least loss first.

    ``memory`` must hold the weights, the loader's working set and a key-value cache for
    ``context`` tokens.
    """
    host = host or default_host()
    first = make_job(source, None, device=device, dtype=dtype, host=host)
    found: list[Candidate] = []
    architecture = None
    for name, (method, preset) in host.presets.items():
        job = make_job(
            first.headers.source, name, device=device, dtype=dtype, host=host, planning=True
        )
        job.architecture = architecture
        loss = 16.0 - preset.bits
        try:
            made = prepare(job)
        except QuantmillError as error:
            cause = "; ".join(item.cause for item in error.findings)
            found.append(Candidate(name, False, 0, 0, 0.0, loss, cause))
            continue
        architecture = job.architecture
        totals = made.totals
        peak = totals["peak_bytes"] + cache_bytes(job.headers.config, context)
        others = [item.cause for item in made.findings.errors if item.code != "QM-MEMORY-001"]
        reason = "; ".join(others)
        if not reason and peak > memory:
            reason = f"needs {peak:,} bytes at its peak, {memory:,} are allowed"
        found.append(
            Candidate(
                name,
                not reason,
                totals["bytes_memory"],
                peak,
                totals["bits_per_weight"],
                loss,
                reason or method.summary,
            )
        )
    return sorted(found, key=lambda item: (not item.fits, item.loss_bits, item.name))


def cache_bytes(config: Mapping[str, Any], context: int) -> int:
    """Key-value cache of one sequence of ``context`` tokens in 16 bits, as the config tells."""
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    attention = config.get("num_attention_heads") or config.get("n_head") or 1
    width = config.get("head_dim") or hidden // max(1, attention)
    return int(2 * layers * heads * width * context * 2)
