"""quantmill: plan, quantize, run and convert language models. The public surface, imported lazily.

>>> import quantmill
>>> plan = quantmill.plan("models/novella", "bnb-nf4")
>>> model = quantmill.load("models/novella", "bnb-nf4")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantmill.api import load, load_tokenizer, method_schema, plan, quantize
    from quantmill.budget.search import quantize_to_budget
    from quantmill.choosing import choose
    from quantmill.comparing import compare
    from quantmill.converting import convert
    from quantmill.findings import Finding, FindingsError, QuantmillError, Severity
    from quantmill.fitting import fits
    from quantmill.host import Host, default_host
    from quantmill.importance import imatrix
    from quantmill.inspection import inspect
    from quantmill.plain import dequantize, dequantize_model, load_into, quantize_model
    from quantmill.saving import save
    from quantmill.verifying import verify

__version__ = "0.1.0"

_PUBLIC = {
    "choose": "quantmill.choosing",
    "compare": "quantmill.comparing",
    "convert": "quantmill.converting",
    "dequantize": "quantmill.plain",
    "dequantize_model": "quantmill.plain",
    "fits": "quantmill.fitting",
    "imatrix": "quantmill.importance",
    "inspect": "quantmill.inspection",
    "load": "quantmill.api",
    "load_into": "quantmill.plain",
    "load_tokenizer": "quantmill.api",
    "method_schema": "quantmill.api",
    "plan": "quantmill.api",
    "quantize": "quantmill.api",
    "quantize_model": "quantmill.plain",
    "quantize_to_budget": "quantmill.budget.search",
    "save": "quantmill.saving",
    "Finding": "quantmill.findings",
    "FindingsError": "quantmill.findings",
    "QuantmillError": "quantmill.findings",
    "Severity": "quantmill.findings",
    "Host": "quantmill.host",
    "default_host": "quantmill.host",
    "verify": "quantmill.verifying",
}

__all__ = [
    "Finding",
    "FindingsError",
    "Host",
    "QuantmillError",
    "Severity",
    "__version__",
    "choose",
    "compare",
    "convert",
    "default_host",
    "dequantize",
    "dequantize_model",
    "fits",
    "imatrix",
    "inspect",
    "load",
    "load_into",
    "load_tokenizer",
    "method_schema",
    "plan",
    "quantize",
    "quantize_model",
    "quantize_to_budget",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'quantmill' has no attribute {name!r}")
    import importlib

    from quantmill.importing import without_collector

    with without_collector():
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
