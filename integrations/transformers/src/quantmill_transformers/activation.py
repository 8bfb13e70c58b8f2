"""Activation: ``from_pretrained`` of transformers through quantmill, for the methods you list.

What changes, and nothing else:

==========================================================  ====================================
``transformers.modeling_utils.PreTrainedModel``             its class method ``from_pretrained``
``peft.tuners.lora.model.LoraModel``                        its static ``_create_new_module``
==========================================================  ====================================

The second one only where PEFT has been imported by the time of :func:`activate` or of a model's
loading: it gives LoRA to quantmill's linears, and leaves all others to PEFT.

The new ``from_pretrained`` looks at the ``quantization_config`` of the call and of the checkpoint.
Where the ``quant_method`` is one that was taken over, or one that this transformers can't read,
quantmill loads the model; every other call goes to the library's own method, unchanged. Auto
classes and pipelines all come through that method.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import QuantmillError, declare

if TYPE_CHECKING:
    from quantmill.findings import Finding
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

WRONG_VERSION = declare("QM-TF-013", "This version of transformers or PEFT can't be activated")
REPLACED = declare("QM-TF-014", "Something else has replaced what activation changed")

TRANSFORMERS_RANGE: Final = ">=5.0,<6"
"""Versions whose ``from_pretrained`` is known to work as described."""
PEFT_RANGE: Final = ">=0.19,<1"
"""Versions of PEFT that call their dispatchers as ours is called."""
SYMBOL: Final = "transformers.modeling_utils.PreTrainedModel.from_pretrained"
PEFT_SYMBOL: Final = "peft.tuners.lora.model.LoraModel._create_new_module"


@dataclass(frozen=True, slots=True)
class Activation:
    """What is active: data, to print and to compare."""

    quant_methods: tuple[str, ...]
    """Values of ``quant_method`` that transformers knows and that were taken over from it."""
    added: tuple[str, ...]
    """Values that installed plugins read and this transformers does not: ours in any case."""
    symbols: tuple[str, ...]
    """What was replaced."""
    transformers: str
    """The version of transformers."""

    def __str__(self) -> str:
        return (
            f"quantmill loads {', '.join(self.quant_methods) or 'nothing'} in place of"
            f" transformers {self.transformers}, and adds {', '.join(self.added) or 'nothing'};"
            f" replaced: {', '.join(self.symbols)}"
        )


@dataclass(slots=True)
class _Replaced:
    """One attribute of a class that was replaced."""

    symbol: str
    owner: type
    original: Any
    new: Any

    @classmethod
    def put(cls, symbol: str, owner: type, new: Any) -> _Replaced:
        name = symbol.rpartition(".")[2]
        original = owner.__dict__[name]
        setattr(owner, name, new)
        return cls(symbol, owner, original, new)

    def undo(self) -> None:
        name = self.symbol.rpartition(".")[2]
        if self.owner.__dict__[name] is not self.new:
            raise QuantmillError(
                REPLACED(
                    self.symbol,
                    "another library has replaced it after quantmill did, so it was left as it is;"
                    " quantmill takes over no calls any more",
                    "deactivate in the reverse order of activation",
                )
            )
        setattr(self.owner, name, self.original)


@dataclass(slots=True)
class _State:
    taken: frozenset[str]
    host: Host
    replaced: list[_Replaced]


log = logging.getLogger("quantmill_transformers")
_LOCK = threading.RLock()
_STATE: _State | None = None


def activate(*quant_methods: str, host: Host | None = None) -> Activation:
    """Let ``from_pretrained`` go through quantmill for the listed ``quant_method`` values.

    Names of methods and short names (``bnb-nf4``) stand for their ``quant_method``; ``"*"`` takes
    over all that installed plugins read. Without any, only what transformers can't read itself is
    added. A second call adds its methods to those that are active; the same call again changes
    nothing.

    Raises:
        QuantmillError: a name is unknown (``QM-TF-010``), or the installed transformers is outside
            :data:`TRANSFORMERS_RANGE` (``QM-TF-013``).
    """
    global _STATE
    problem = _out_of_range("transformers", TRANSFORMERS_RANGE, SYMBOL, "quantmill.load")
    if problem is not None:
        raise QuantmillError(problem)
    from quantmill.host import default_host
    from quantmill_transformers.claims import resolve_names

    with _LOCK:
        host = host or (default_host() if _STATE is None else _STATE.host)
        taken = frozenset(resolve_names(quant_methods, host))
        if _STATE is None:
            _STATE = _State(taken, host, [_replace()])
        else:
            _STATE.taken, _STATE.host = _STATE.taken | taken, host
        _replace_in_peft(_STATE)
        return _describe(_STATE)


def deactivate() -> None:
    """Put back what was there. Without an activation nothing happens.

    Models that are loaded stay as they are.

    Raises:
        QuantmillError: someone replaced the method again on top of ours (``QM-TF-014``); quantmill
            takes no call over any more, the method itself is left to them.
    """
    global _STATE
    with _LOCK:
        state, _STATE = _STATE, None
        problems: list[Finding] = []
        for item in state.replaced if state is not None else ():
            try:
                item.undo()
            except QuantmillError as error:
                problems.extend(error.findings)
        if problems:
            raise QuantmillError(*problems)


def active() -> Activation | None:
    """What is active at the moment."""
    with _LOCK:
        return None if _STATE is None else _describe(_STATE)


@contextmanager
def activated(*quant_methods: str, host: Host | None = None) -> Iterator[Activation]:
    """:func:`activate` for a ``with`` block; afterwards all is as it was before, nested or not."""
    global _STATE
    with _LOCK:
        before = None if _STATE is None else (_STATE.taken, _STATE.host)
    made = activate(*quant_methods, host=host)
    try:
        yield made
    finally:
        with _LOCK:
            if before is None:
                deactivate()
            elif _STATE is not None:
                _STATE.taken, _STATE.host = before


def _out_of_range(name: str, versions: str, symbol: str, instead: str) -> Finding | None:
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version and SpecifierSet(versions).contains(version, prereleases=True):
        return None
    there = f"{name} {version} is installed" if version else f"{name} is missing"
    return WRONG_VERSION(
        name,
        f"{there}; {symbol} is known to be replaceable in {versions}",
        f'pip install "{name}{versions}", or call {instead}, which changes nothing in it',
    )


def _describe(state: _State) -> Activation:
    from quantmill_transformers.claims import installed_keys, theirs

    known = theirs()
    return Activation(
        tuple(sorted(state.taken & known)),
        tuple(sorted((installed_keys(state.host) | state.taken) - known)),
        tuple(item.symbol for item in state.replaced),
        importlib.metadata.version("transformers"),
    )


def _replace() -> _Replaced:
    from transformers import PreTrainedModel

    original = PreTrainedModel.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        state = _STATE
        if state is None or not _is_ours(cls, source, kwargs, state):
            return original(cls, source, *args, **kwargs)
        from quantmill_transformers.pretrained import load_pretrained

        with _LOCK:
            _replace_in_peft(state)
        return load_pretrained(cls, source, args, kwargs, state.host)

    return _Replaced.put(SYMBOL, PreTrainedModel, classmethod(from_pretrained))


def _replace_in_peft(state: _State) -> None:
    """Once PEFT is there. It is never imported for this: who uses it imports it."""
    module = sys.modules.get("peft.tuners.lora.model")
    if module is None or any(item.symbol == PEFT_SYMBOL for item in state.replaced):
        return
    problem = _out_of_range("peft", PEFT_RANGE, PEFT_SYMBOL, "nothing of it")
    if problem is not None:
        log.warning("%s", problem)  # Models load all the same; adapters find no place on them.
        return
    original = module.LoraModel.__dict__["_create_new_module"].__func__

    @functools.wraps(original)
    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        from quantmill_transformers.lora import dispatch

        made = None
        if _STATE is not None:
            made = dispatch(target, adapter_name, lora_config, **kwargs)
        return original(lora_config, adapter_name, target, **kwargs) if made is None else made

    state.replaced.append(_Replaced.put(PEFT_SYMBOL, module.LoraModel, staticmethod(create)))


def _is_ours(cls: Any, source: Any, kwargs: dict[str, Any], state: _State) -> bool:
    from quantmill_transformers.claims import claims, stored_config_of

    taken = set(state.taken)
    if claims(kwargs.get("quantization_config"), taken, state.host):
        return True
    if source is None:
        return False
    config = kwargs.get("config")
    if config is None or isinstance(config, str):
        config = _config_dict(cls, config or source, kwargs)
    stored = stored_config_of(config) or _detected(source, kwargs, taken, state.host)
    return claims(stored, taken, state.host)


def _detected(source: Any, kwargs: dict[str, Any], taken: set[str], host: Host) -> Any:
    """The config that a dialect recognises in a local folder whose ``config.json`` has none."""
    from quantmill_transformers.claims import theirs

    able = [item for item in host.dialects if item.detect is not None]
    if not any(key in taken or key not in theirs() for item in able for key in item.quant_methods):
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

    from quantmill_transformers.arguments import HUB

    where = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **where)
    except OSError:
        return {}
    return dict(found)
