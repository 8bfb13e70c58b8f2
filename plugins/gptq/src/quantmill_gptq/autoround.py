"""auto-round's dialect where its files are packed as GPTQ's.

``packing_format`` says how: ``auto_round:auto_gptq`` and ``auto_round:gptq`` have zero points minus
one (format ``gptq``), ``auto_round`` and ``auto_round:gptqmodel`` as they are (``gptq_v2``).
Source: auto-round 0.5 to 0.9, ``auto_round.inference.backend``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["PACKINGS", "is_packed_so", "translate"]

PACKINGS: Final = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
_MODULE = ("bits", "group_size", "sym")


def is_packed_so(raw: Mapping[str, Any]) -> bool:
    """Whether a config of auto-round is about integers in GPTQ's packing."""
    if str(raw.get("packing_format", "auto_round:auto_gptq")) not in PACKINGS:
        return False
    return str(raw.get("data_type") or "int").startswith("int") and _is_float(raw.get("act_bits"))


def _is_float(bits: Any) -> bool:
    """Whether activations of so many bits are not quantized."""
    return bits is None or (isinstance(bits, int) and bits >= 16)


def translate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config in GPTQModel's words."""
    packing = str(raw.get("packing_format", "auto_round:auto_gptq"))
    found: dict[str, Any] = {key: raw[key] for key in _MODULE if key in raw}
    found |= {
        "quant_method": "gptq",
        "checkpoint_format": PACKINGS[packing],
        "desc_act": False,
        "lm_head": bool(raw.get("quant_lm_head", False)),
        "meta": {"quantizer": [f"auto_round:{raw.get('autoround_version', 'unknown')}"]},
    }
    if raw.get("modules_to_not_convert"):
        found["modules_to_not_convert"] = raw["modules_to_not_convert"]
    dynamic: dict[str, dict[str, Any]] = {}
    extra = raw.get("extra_config")
    for name, item in (extra if isinstance(extra, Mapping) else {}).items():
        if not isinstance(item, Mapping):
            continue
        # A name may be an expression: one that is none has its dots taken literally.
        body = name if re.search(r"[*+?\\^$|(\[]", name) else re.escape(name)
        if _is_float(item.get("bits", found.get("bits"))) and "bits" in item:
            dynamic[f"-:^{body}$"] = {}
        else:
            fields = {key: item[key] for key in _MODULE if key in item}
            differing = {key: value for key, value in fields.items() if value != found.get(key)}
            if differing:
                dynamic[f"+:^{body}$"] = differing
    if dynamic:
        found["dynamic"] = dynamic
    return found
