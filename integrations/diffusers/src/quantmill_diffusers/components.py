"""A pipeline's ``quantization_config``: METHOD by component.

METHOD is what it is everywhere: the same strings, dicts and config objects that
``quantmill.load`` and the transformers integration take, so that one object serves a denoiser of
diffusers and a text encoder of transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import PipelineQuantizationConfig
from torch import nn

from quantmill.config import suggestion
from quantmill.findings import Finding, FindingsError, QuantmillError, declare
from quantmill.host import Host
from quantmill.job import Request
from quantmill.pretrained import HUB
from quantmill.stages.select import parse_method
from quantmill.takeover import is_active

__all__ = ["Components", "for_pipeline"]

NO_COMPONENT = declare("QM-DIFF-010", "A method was given for what is no component with weights")
BAD_METHOD = declare("QM-DIFF-011", "A component's method can't be read")
NOT_ACTIVE = declare("QM-DIFF-012", "A component is of a framework that is not activated")


class Components(PipelineQuantizationConfig):
    """What the library asks for the method of each component."""

    def __init__(self, methods: Mapping[str, Any], requests: Mapping[str, Request]) -> None:
        """``methods`` as the user wrote them, ``requests`` as they were read."""
        self._requests = dict(requests)
        super().__init__(quant_mapping=dict(methods))

    def post_init(self) -> None:
        """Nothing is checked against the library's own classes: any backend will do."""
        self.is_granular = True

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str = "") -> Any:
        return self._requests.get(module_name)

    def __repr__(self) -> str:
        return f"Components({self.quant_mapping!r})"


def for_pipeline(
    cls: Any, source: Any, methods: Mapping[Any, Any], kwargs: Mapping[str, Any], host: Host
) -> Components:
    """The mapping that a user gave to ``DiffusionPipeline.from_pretrained``, checked.

    Raises:
        FindingsError: all that is wrong with it, before any component is loaded.
    """
    where = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
    index = cls.load_config(source, **where)
    known = {
        name: value
        for name, value in index.items()
        if isinstance(value, list | tuple) and len(value) == 2 and value[0] is not None
    }
    problems: list[Finding] = []
    requests: dict[str, Request] = {}
    for name, method in methods.items():
        problems.extend(_misplaced(str(name), known, kwargs))
        try:
            requests[str(name)] = parse_method(method, host)
        except QuantmillError as error:
            problems.extend(
                BAD_METHOD(f"{name}: {item.where}", f"{item.code}: {item.cause}", item.fix)
                for item in error.findings
            )
    if problems:
        raise FindingsError(problems)
    return Components({str(name): method for name, method in methods.items()}, requests)


def _misplaced(name: str, known: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Iterator[Finding]:
    if name not in known:
        yield NO_COMPONENT(
            name,
            "the pipeline has no such component",
            suggestion(name, known) or f"use some of: {', '.join(sorted(known))}",
        )
        return
    if name in kwargs:
        cause = "it was given as an object, which is taken as it is"
        yield NO_COMPONENT(name, cause, "give a method or an object, not both")
        return
    library, cls_name = known[name]
    cls = _class_of(library, cls_name)
    if cls is None:
        return  # A pipeline's own module; the library finds it.
    if not issubclass(cls, nn.Module):
        yield NO_COMPONENT(name, f"{cls_name} holds no weights", "leave it out")
    elif library == "transformers" and not is_active("transformers"):
        yield NOT_ACTIVE(
            name,
            f"{cls_name} is a model of transformers, whose from_pretrained would not know METHOD",
            "import quantmill_transformers; quantmill_transformers.activate()",
        )


def _class_of(library: str, name: str) -> type | None:
    if library not in ("diffusers", "transformers"):
        return None
    found = getattr(importlib.import_module(library), name, None)
    return found if isinstance(found, type) else None
