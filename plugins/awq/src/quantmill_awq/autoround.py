"""auto-round's dialect where its files are packed as AWQ's (``auto_round:auto_awq``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["is_packed_so", "translate"]

_PACKINGS = ("auto_round:auto_awq", "auto_round:awq")


def is_packed_so(raw: Mapping[str, Any]) -> bool:
    """Whether a config of auto-round is about integers in AWQ's packing."""
    act = raw.get("act_bits")
    return str(raw.get("packing_format")) in _PACKINGS and (
        act is None or (isinstance(act, int) and act >= 16)
    )


def translate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config in AutoAWQ's words; modules of other bits are float and in the skip list."""
    found: dict[str, Any] = {key: raw[key] for key in ("bits", "group_size") if key in raw}
    found |= {
        "quant_method": "awq",
        "zero_point": not raw.get("sym", True),
        "version": "gemm",
        "meta": {"quantizer": [f"auto_round:{raw.get('autoround_version', 'unknown')}"]},
    }
    extra = raw.get("extra_config")
    skipped = [
        name
        for name, item in (extra if isinstance(extra, Mapping) else {}).items()
        if isinstance(item, Mapping) and isinstance(item.get("bits"), int) and item["bits"] >= 16
    ]
    skipped += list(raw.get("modules_to_not_convert") or [])
    if skipped:
        found["modules_to_not_convert"] = skipped
    return found
