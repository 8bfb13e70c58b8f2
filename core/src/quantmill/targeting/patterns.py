"""The pattern language of targeting.

==========================  ====================================================================
``model.layers.0.mlp``      the module of that name, and everything under it
``lm_head``, ``mlp.up``     also modules whose last components are these
``model.*.q_proj``          glob: ``*`` within a component, ``**`` across, ``?``, ``[...]``
``re:.*down.*``             a regular expression that the whole name must match
``cls:Linear``              modules of that class
``layers:0-3,-1``           modules in those blocks; negative counts from the last
``role:mlp``                ``attention``, ``mlp``, ``head``, ``embedding``, ``expert``, ...
``a & b``, ``!a``           both; not
==========================  ====================================================================

More specific patterns win: a name over a glob (more literal characters over fewer) over a
regular expression over roles, layers and classes; a conjunction counts its parts together.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

from quantmill.findings import QuantmillError, declare
from quantmill.targeting.types import ModuleInfo

__all__ = ["Pattern", "parse"]

BAD_PATTERN = declare("QM-TARGET-001", "A pattern can't be read")

Specificity = tuple[int, int]


class Pattern(ABC):
    """A parsed pattern."""

    text: str

    @abstractmethod
    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        """Whether a module of a model with ``n_layers`` blocks is meant."""

    @property
    @abstractmethod
    def specificity(self) -> Specificity:
        """Rank and literal characters; the larger wins."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class _Name(Pattern):
    text: str

    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        name = module.name
        return (
            name == self.text or name.startswith(f"{self.text}.") or name.endswith(f".{self.text}")
        )

    @property
    def specificity(self) -> Specificity:
        return (5, len(self.text))


@dataclass(frozen=True, slots=True)
class _Regex(Pattern):
    text: str
    compiled: re.Pattern[str]
    rank: Specificity

    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        return self.compiled.fullmatch(module.name) is not None

    @property
    def specificity(self) -> Specificity:
        return self.rank


@dataclass(frozen=True, slots=True)
class _Class(Pattern):
    text: str
    name: str

    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        return module.cls == self.name

    @property
    def specificity(self) -> Specificity:
        return (1, 0)


@dataclass(frozen=True, slots=True)
class _Role(Pattern):
    text: str
    role: str

    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        return module.role == self.role

    @property
    def specificity(self) -> Specificity:
        return (2, 0)


@dataclass(frozen=True, slots=True)
class _Layers(Pattern):
    text: str
    ranges: tuple[tuple[int, int], ...]

    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        if module.layer is None:
            return False
        for first, last in self.ranges:
            low = first if first >= 0 else n_layers + first
            high = last if last >= 0 else n_layers + last
            if low <= module.layer <= high:
                return True
        return False

    @property
    def specificity(self) -> Specificity:
        return (2, 1)


@dataclass(frozen=True, slots=True)
class _Not(Pattern):
    text: str
    part: Pattern

    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        return not self.part.matches(module, n_layers)

    @property
    def specificity(self) -> Specificity:
        return (0, 0)


@dataclass(frozen=True, slots=True)
class _And(Pattern):
    text: str
    parts: tuple[Pattern, ...]

    def matches(self, module: ModuleInfo, n_layers: int) -> bool:
        return all(part.matches(module, n_layers) for part in self.parts)

    @property
    def specificity(self) -> Specificity:
        ranks = [part.specificity for part in self.parts]
        return (max(rank for rank, _ in ranks), sum(count + 1 for _, count in ranks))


def _refuse(text: str, cause: str, fix: str) -> QuantmillError:
    return QuantmillError(BAD_PATTERN(text, cause, fix))


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """Parse one pattern.

    Raises:
        QuantmillError: ``QM-TARGET-001`` with the place of the error.
    """
    text = text.strip()
    if text.startswith("re:"):
        return _regex(text)
    parts = [part.strip() for part in text.split("&")]
    if len(parts) > 1:
        parsed = tuple(parse(part) for part in parts)
        return _And(" & ".join(map(str, parsed)), parsed)
    if text.startswith("!"):
        part = parse(text[1:])
        return _Not(f"!{part}", part)
    if not text:
        raise _refuse(text, "a pattern is empty", "name a module, or leave the pattern out")
    kind, colon, value = text.partition(":")
    if colon and kind == "cls":
        return _Class(text, value)
    if colon and kind == "role":
        return _Role(text, value)
    if colon and kind == "layers":
        return _Layers(text, _ranges(text, value))
    if colon:
        raise _refuse(text, f"{kind!r} is no kind of pattern", "use re:, cls:, layers: or role:")
    if any(sign in text for sign in "*?["):
        return _Regex(text, re.compile(_glob(text)), (4, sum(c not in "*?[]" for c in text)))
    return _Name(text)


def _regex(text: str) -> Pattern:
    body = text[3:]
    try:
        compiled = re.compile(body)
    except re.error as error:
        raise _refuse(
            text, f"not a regular expression: {error}", "correct it at that position"
        ) from None
    return _Regex(text, compiled, (3, len(body)))


def _glob(text: str) -> str:
    out, index = "", 0
    while index < len(text):
        char = text[index]
        if text.startswith("**", index):
            out += ".*"
            index += 1
        elif char == "*":
            out += "[^.]*"
        elif char == "?":
            out += "[^.]"
        elif char == "[":
            end = text.find("]", index + 1)
            if end < 0:
                raise _refuse(text, f"'[' at {index} has no ']'", "close the bracket")
            body = text[index + 1 : end].replace("\\", "\\\\")
            out += "[" + ("^" + body[1:] if body.startswith("!") else body) + "]"
            index = end
        else:
            out += re.escape(char)
        index += 1
    return out


def _ranges(text: str, value: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(-?\d+))?\s*", part)
        if match is None:
            raise _refuse(text, f"{part!r} is no layer or range", "write layers:0-3,-1")
        first = int(match.group(1))
        found.append((first, int(match.group(2)) if match.group(2) else first))
    return tuple(found)
