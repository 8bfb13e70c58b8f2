"""Activation: ``from_pretrained`` of transformers through quantmill, for the methods you list.

What changes, and nothing else:

==========================================================  ====================================
``transformers.modeling_utils.PreTrainedModel``             its class method ``from_pretrained``
``peft``: the four of                                       for quantmill's linears only
:mod:`quantmill_transformers.adapters`
==========================================================  ====================================

Those of PEFT only where it has been imported by the time of :func:`activate` or of a model's
loading: they give LoRA to quantmill's linears, and leave all others to PEFT.

The new ``from_pretrained`` looks at the ``quantization_config`` of the call and of the checkpoint,
and at a ``gguf_file``. Where the ``quant_method`` is one that was taken over, or one that this
transformers can't read, quantmill loads the model; every other call goes to the library's own
method, unchanged. Auto classes and pipelines all come through that method.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import QuantmillError
from quantmill.takeover import (
    Activation,
    Replaced,
    State,
    Takeover,
    installed_keys,
    version_problem,
)
from quantmill_transformers.adapters import PEFT_SYMBOL, replaced_in_peft

if TYPE_CHECKING:
    from quantmill.host import Host

__all__ = [
    "PEFT_RANGE",
    "TRANSFORMERS_RANGE",
    "Activation",
    "activate",
    "activated",
    "active",
    "deactivate",
]

TRANSFORMERS_RANGE: Final = ">=5.0,<6"
"""Versions whose ``from_pretrained`` is known to work as described."""
PEFT_RANGE: Final = ">=0.19,<1"
"""Versions of PEFT that call their dispatchers as ours is called."""
SYMBOL: Final = "transformers.modeling_utils.PreTrainedModel.from_pretrained"

log = logging.getLogger("quantmill_transformers")


def activate(*quant_methods: str, host: Host | None = None) -> Activation:
    """Let ``from_pretrained`` go through quantmill for the listed ``quant_method`` values.

    Names of methods and short names (``bnb-nf4``) stand for their ``quant_method``; ``"*"`` takes
    over all that installed plugins read. Without any, only what transformers can't read itself is
    added. A second call adds its methods to those that are active; the same call again changes
    nothing.

    Raises:
        QuantmillError: a name is unknown (``QM-TAKE-001``), or the installed transformers is
            outside :data:`TRANSFORMERS_RANGE` (``QM-TAKE-002``).
    """
    return _TAKEOVER.activate(quant_methods, host)


def deactivate() -> None:
    """Put back what was there. Without an activation nothing happens.

    Models that are loaded stay as they are.

    Raises:
        QuantmillError: someone replaced the method again on top of ours (``QM-TAKE-003``);
            quantmill takes no call over any more, the method itself is left to them.
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
    from quantmill_transformers.claims import theirs

    return theirs()


def _replace() -> list[Replaced]:
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        state = _TAKEOVER.state
        if state is None or not _is_ours(cls, source, kwargs, state):
            return original(cls, source, *args, **kwargs)
        from quantmill_transformers.pretrained import load_pretrained

        with _TAKEOVER.lock:
            _replace_in_peft(state)
        return load_pretrained(cls, source, args, kwargs, state.host)

    return [Replaced.put(SYMBOL, PreTrainedModel, classmethod(from_pretrained))]


def _replace_in_peft(state: State) -> None:
    """Once PEFT is there. It is never imported for this: who uses it imports it."""
    if "peft.tuners.lora.model" not in sys.modules:
        return
    if any(item.symbol == PEFT_SYMBOL for item in state.replaced):
        return
    problem = version_problem("peft", PEFT_RANGE, PEFT_SYMBOL, "nothing of it")
    if problem is not None:
        log.warning("%s", problem)  # Models load all the same; adapters find no place on them.
        return
    state.replaced.extend(replaced_in_peft(lambda: _TAKEOVER.state is not None))


_TAKEOVER: Final = Takeover(
    "transformers",
    TRANSFORMERS_RANGE,
    SYMBOL,
    "quantmill.load",
    _theirs,
    _replace,
    _replace_in_peft,
)


def _is_ours(cls: Any, source: Any, kwargs: dict[str, Any], state: State) -> bool:
    from quantmill_transformers.claims import stored_config_of

    file = kwargs.get("gguf_file") or (source if Path(source or "").is_file() else None)
    if file is not None:
        return _holds_ours(file, state)
    if _TAKEOVER.claims(kwargs.get("quantization_config")):
        return True
    if source is None:
        return False
    config = kwargs.get("config")
    if config is None or isinstance(config, str):
        config = _config_dict(cls, config or source, kwargs)
    stored = stored_config_of(config) or _detected(source, kwargs, state)
    return _TAKEOVER.claims(stored)


def _holds_ours(file: Any, state: State) -> bool:
    """Whether a file is of a format whose methods were taken over, or are ours alone."""
    from quantmill.checkpoint.containers import container_for

    container = container_for(file, state.host)
    if container is None:
        return False
    methods = [state.host.methods[name] for name in container.methods if name in state.host.methods]
    keys = {key for method in methods for key in method.quant_methods}
    return bool(keys & state.taken or keys - _theirs())


def _detected(source: Any, kwargs: dict[str, Any], state: State) -> Any:
    """The config that a dialect recognises in a local folder whose ``config.json`` has none."""
    host, ours = state.host, state.taken | installed_keys(state.host) - _theirs()
    able = [item for item in host.dialects if item.detect is not None]
    if not any(key in ours for item in able for key in item.quant_methods):
        return None
    folder = Path(source) / (kwargs.get("subfolder") or "")
    if not folder.is_dir():
        return None
    from quantmill.checkpoint.containers import open_checkpoint
    from quantmill.stages.select import detect

    try:
        headers = open_checkpoint(folder, host)
        detect(headers, host)
        return headers.config.get("quantization_config")
    except QuantmillError:
        return None  # The library says what it can't read.


def _config_dict(cls: Any, source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` as it is; empty where there is none, which the library then says better."""
    from transformers import PreTrainedConfig

    from quantmill.pretrained import HUB

    where = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **where)
    except OSError:
        return {}
    return dict(found)
