"""Activation: ``from_pretrained`` of diffusers through quantmill, for the methods you list.

What changes, and nothing else:

==========================================================  ====================================
``diffusers.models.modeling_utils.ModelMixin``              its class method ``from_pretrained``
``diffusers.pipelines.pipeline_utils.DiffusionPipeline``    its class method ``from_pretrained``
==========================================================  ====================================

The first decides, as the transformers integration does, by the ``quant_method`` of the call's and
the checkpoint's ``quantization_config`` who loads a component. The second only lets a pipeline's
``quantization_config`` be a mapping from components to METHOD; what it loads, and how, is left to
the library.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from quantmill.takeover import Activation, Replaced, Takeover

if TYPE_CHECKING:
    from quantmill.host import Host

__all__ = [
    "DIFFUSERS_RANGE",
    "Activation",
    "activate",
    "activated",
    "active",
    "deactivate",
]

DIFFUSERS_RANGE: Final = ">=0.36,<1"
"""Versions whose ``from_pretrained`` is known to work as described."""
SYMBOL: Final = "diffusers.models.modeling_utils.ModelMixin.from_pretrained"
PIPELINE_SYMBOL: Final = "diffusers.pipelines.pipeline_utils.DiffusionPipeline.from_pretrained"


def activate(*quant_methods: str, host: Host | None = None) -> Activation:
    """Let ``from_pretrained`` go through quantmill for the listed ``quant_method`` values.

    Names of methods and short names (``bnb-nf4``) stand for their ``quant_method``; ``"*"`` takes
    over all that installed plugins read. Without any, only what diffusers can't read itself is
    added. A second call adds its methods to those that are active.

    Text encoders are models of transformers: ``quantmill_transformers.activate`` is for them.

    Raises:
        QuantmillError: a name is unknown (``QM-TAKE-001``), or the installed diffusers is outside
            :data:`DIFFUSERS_RANGE` (``QM-TAKE-002``).
    """
    return _TAKEOVER.activate(quant_methods, host)


def deactivate() -> None:
    """Put back what was there. Without an activation nothing happens; models stay as they are.

    Raises:
        QuantmillError: someone replaced a method again on top of ours (``QM-TAKE-003``).
    """
    _TAKEOVER.deactivate()


def active() -> Activation | None:
    """What is active at the moment."""
    return _TAKEOVER.active()


@contextmanager
def activated(*quant_methods: str, host: Host | None = None) -> Iterator[Activation]:
    """:func:`activate` for a ``with`` block; afterwards all is as it was before, nested or not."""
    with _TAKEOVER.activated(quant_methods, host) as made:
        yield made


def _theirs() -> set[str]:
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from quantmill.takeover import without_variants

    return without_variants(AUTO_QUANTIZER_MAPPING)


def _replace() -> list[Replaced]:
    from diffusers import DiffusionPipeline, ModelMixin

    of_models = ModelMixin.__dict__["from_pretrained"].__func__
    of_pipelines = DiffusionPipeline.__dict__["from_pretrained"].__func__

    @functools.wraps(of_models)
    def model(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        state = _TAKEOVER.state
        if state is None or args or not _is_ours(cls, source, kwargs):
            return of_models(cls, source, *args, **kwargs)
        from quantmill_diffusers.pretrained import load_pretrained

        return load_pretrained(cls, source, kwargs, state.host)

    @functools.wraps(of_pipelines)
    def pipeline(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        state = _TAKEOVER.state
        asked = kwargs.get("quantization_config")
        if state is not None and isinstance(asked, Mapping):
            from quantmill_diffusers.components import for_pipeline

            kwargs["quantization_config"] = for_pipeline(cls, source, asked, kwargs, state.host)
        return of_pipelines(cls, source, *args, **kwargs)

    return [
        Replaced.put(SYMBOL, ModelMixin, classmethod(model)),
        Replaced.put(PIPELINE_SYMBOL, DiffusionPipeline, classmethod(pipeline)),
    ]


def _is_ours(cls: Any, source: Any, kwargs: dict[str, Any]) -> bool:
    from quantmill.pretrained import HUB

    if _TAKEOVER.claims(kwargs.get("quantization_config")):
        return True
    where = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
    try:
        config = cls.load_config(source, **where)
    except (OSError, ValueError):
        return False  # The library says what it can't read.
    return _TAKEOVER.claims(config.get("quantization_config"))


_TAKEOVER: Final = Takeover(
    "diffusers", DIFFUSERS_RANGE, SYMBOL, "quantmill.load", _theirs, _replace
)
