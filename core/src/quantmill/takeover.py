"""Taking calls of a framework over: which ones, and how they are given back.

What every integration's ``activate`` does is here: names that a user lists become ``quant_method``
keys, attributes of classes are replaced and put back, versions are checked, and a call is ours or
the framework's by the ``quant_method`` it is about. Integrations import this module with their
package, so that nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import Finding, QuantmillError, declare
from quantmill.registrations import resolve

if TYPE_CHECKING:
    from quantmill.host import Host

__all__ = [
    "Activation",
    "Replaced",
    "State",
    "Takeover",
    "claims",
    "installed_keys",
    "is_active",
    "quant_method_of",
    "resolve_names",
    "version_problem",
    "without_variants",
]

UNKNOWN_NAME = declare("QM-TAKE-001", "activate() was given a name that no installed plugin reads")
WRONG_VERSION = declare("QM-TAKE-002", "This version of a framework can't be activated")
REPLACED = declare("QM-TAKE-003", "Something else has replaced what activation changed")


@dataclass(frozen=True, slots=True)
class Activation:
    """What is active: data, to print and to compare."""

    framework: str
    quant_methods: tuple[str, ...]
    """Values of ``quant_method`` that the framework knows and that were taken over from it."""
    added: tuple[str, ...]
    """Values that installed plugins read and this framework does not: ours in any case."""
    symbols: tuple[str, ...]
    """What was replaced."""
    version: str
    """The framework's."""

    def __str__(self) -> str:
        return (
            f"quantmill loads {', '.join(self.quant_methods) or 'nothing'} in place of"
            f" {self.framework} {self.version}, and adds {', '.join(self.added) or 'nothing'};"
            f" replaced: {', '.join(self.symbols)}"
        )


@dataclass(slots=True)
class Replaced:
    """One attribute of a class or a module that was replaced."""

    symbol: str
    owner: Any
    original: Any
    new: Any

    @classmethod
    def put(cls, symbol: str, owner: Any, new: Any) -> Replaced:
        """Replace the last component of ``symbol`` in ``owner``."""
        name = symbol.rpartition(".")[2]
        original = owner.__dict__[name]
        setattr(owner, name, new)
        return cls(symbol, owner, original, new)

    def undo(self) -> None:
        """Put the original back.

        Raises:
            QuantmillError: something else is there by now (``QM-TAKE-003``).
        """
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
class State:
    """What an activation goes by while it lasts."""

    taken: frozenset[str]
    host: Host
    replaced: list[Replaced] = field(default_factory=list)


_ACTIVE: Final[dict[str, Takeover]] = {}


def is_active(framework: str) -> bool:
    """Whether calls of a framework are being taken over."""
    return framework in _ACTIVE


@dataclass(slots=True)
class Takeover:
    """The activation of one framework; one object for the whole process."""

    framework: str
    """Its distribution."""
    versions: str
    """Those whose symbols are known to be replaceable."""
    symbol: str
    """The main one, for messages."""
    instead: str
    """What to call where the version is another."""
    known: Callable[[], set[str]]
    """Values of ``quant_method`` that the framework reads itself."""
    replace: Callable[[], list[Replaced]]
    """Puts the new attributes in place."""
    also: Callable[[State], None] | None = None
    """Called after each activation, for what is replaced only once it is imported."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    state: State | None = None

    def activate(self, names: Iterable[str], host: Host | None = None) -> Activation:
        """Take over what is listed; see the integrations' ``activate``.

        Raises:
            QuantmillError: a name is unknown, or the framework's version is out of range.
        """
        from quantmill.host import default_host

        problem = version_problem(self.framework, self.versions, self.symbol, self.instead)
        if problem is not None:
            raise QuantmillError(problem)
        with self.lock:
            host = host or (default_host() if self.state is None else self.state.host)
            taken = frozenset(resolve_names(names, host))
            if self.state is None:
                self.state = State(taken, host, self.replace())
                _ACTIVE[self.framework] = self
            else:
                self.state.taken, self.state.host = self.state.taken | taken, host
            if self.also is not None:
                self.also(self.state)
            return self._describe(self.state)

    def deactivate(self) -> None:
        """Put back what was there. Without an activation nothing happens.

        Raises:
            QuantmillError: someone replaced it again on top of ours.
        """
        with self.lock:
            state, self.state = self.state, None
            _ACTIVE.pop(self.framework, None)
            problems: list[Finding] = []
            for item in reversed(state.replaced) if state is not None else ():
                try:
                    item.undo()
                except QuantmillError as error:
                    problems.extend(error.findings)
            if problems:
                raise QuantmillError(*problems)

    def active(self) -> Activation | None:
        """What is active at the moment."""
        with self.lock:
            return None if self.state is None else self._describe(self.state)

    @contextmanager
    def activated(self, names: Iterable[str], host: Host | None = None) -> Iterator[Activation]:
        """For a ``with`` block; afterwards all is as it was before, nested or not."""
        with self.lock:
            before = None if self.state is None else (self.state.taken, self.state.host)
        made = self.activate(names, host)
        try:
            yield made
        finally:
            with self.lock:
                if before is None:
                    self.deactivate()
                elif self.state is not None:
                    self.state.taken, self.state.host = before

    def claims(self, value: Any) -> bool:
        """Whether a config, the user's or a checkpoint's, is for us."""
        if self.state is None:
            return False
        return claims(value, self.state.taken, self.known(), self.state.host)

    def _describe(self, state: State) -> Activation:
        known = self.known()
        return Activation(
            self.framework,
            tuple(sorted(state.taken & known)),
            tuple(sorted((installed_keys(state.host) | state.taken) - known)),
            tuple(item.symbol for item in state.replaced),
            importlib.metadata.version(self.framework),
        )


def version_problem(name: str, versions: str, symbol: str, instead: str) -> Finding | None:
    """Why ``symbol`` of a distribution can't be replaced, if so."""
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


_VARIANTS = ("_4bit", "_8bit")


def without_variants(keys: Iterable[Any]) -> set[str]:
    """A framework's keys as checkpoints spell them: bitsandbytes has an entry for each of its two
    methods, under names of its own."""
    found: set[str] = set()
    for key in keys:
        name = str(getattr(key, "value", key))
        for suffix in _VARIANTS:
            name = name.removesuffix(suffix)
        found.add(name)
    return found


def installed_keys(host: Host) -> set[str]:
    """Values of ``quant_method`` that installed plugins read, tables of targets included."""
    from quantmill.stages.table import KEY

    return {KEY, *(key for item in host.dialects for key in item.quant_methods)}


def resolve_names(names: Iterable[str], host: Host) -> set[str]:
    """``quant_method`` keys for what a user listed: keys, methods, their short names, or ``*``.

    Raises:
        QuantmillError: a name means nothing here.
    """
    from quantmill.config import suggestion

    keys, found, problems = installed_keys(host), set(), []
    methods = {name: item.quant_methods for name, item in host.methods.items()}
    methods |= {alias: m.quant_methods for m in host.methods.values() for alias in m.aliases}
    methods |= {name: item.quant_methods for name, (item, _) in host.presets.items()}
    for name in names:
        if name == "*":
            found |= keys
        elif name in keys:
            found.add(name)
        elif name in methods:
            found |= set(methods[name])
        else:
            known = sorted({*keys, *methods})
            problems.append(
                UNKNOWN_NAME(
                    name,
                    f"no installed plugin reads quant_method {name!r}",
                    suggestion(name, known) or f"use some of: {', '.join(known)}; or '*' for all",
                )
            )
    if problems:
        raise QuantmillError(*problems)
    return found


def quant_method_of(value: Any, host: Host) -> str | None:
    """The ``quant_method`` that a config is about; None where it names none.

    Methods of ours have a config without one too: see :func:`claims`.
    """
    data = value if isinstance(value, Mapping) else None
    if data is None:
        to_dict = getattr(value, "to_dict", None)
        data = dict(to_dict()) if callable(to_dict) else {}
    named = data.get("quant_method", getattr(value, "quant_method", None))
    if named is not None:
        return str(getattr(named, "value", named))
    for dialect in host.dialects:
        if any(key in data for key in dialect.marker_keys) and (
            dialect.accepts is None or resolve(dialect.accepts)(data)
        ):
            return dialect.quant_methods[0]
    return None


def claims(value: Any, taken: Iterable[str], known: Iterable[str], host: Host) -> bool:
    """Whether a config, the user's or a checkpoint's, is for us.

    It is where the framework has no way to read it (it knows the keys ``known``), or where its
    ``quant_method`` was taken over.
    """
    from quantmill.config import MethodConfig
    from quantmill.job import Request
    from quantmill.stages.select import OWN_KEYS

    if value is None:
        return False
    if isinstance(value, str | MethodConfig | Request):
        return True
    if isinstance(value, Mapping) and any(key in value for key in OWN_KEYS):
        return True
    key = quant_method_of(value, host)
    return key is None or key in set(taken) or key not in set(known)
