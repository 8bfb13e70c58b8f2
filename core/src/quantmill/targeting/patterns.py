r"""The pattern language of targeting.

==========================  ====================================================================
``model.layers.0.mlp``      the module of that name, and everything under it
``lm_head``, ``mlp.up``     also modules whose last components are these
``model.*.q_proj``          glob: ``*`` within a component, ``**`` across, ``?``, ``[...]``
``re:.*down.*``             a regular expression that the whole name must match (``&`` is ``\&``)
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

from quantmill.config import suggestion
from quantmill.findings import QuantmillError, declare
from quantmill.targeting.types import ROLES, ModuleInfo

__all__ = ["Pattern", "parse"]

BAD_PATTERN = declare("QM-TARGET-001", "A pattern can't be read")

Specificity = tuple[int, int]

_KINDS = {"re": "re:.*down.*", "cls": "cls:Linear", "layers": "layers:0-3", "role": "role:mlp"}
_AND = re.compile(r"(?<!\\)&")
_SIGNS = re.compile(r"(?:!\s*)+")


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
    if not text:
        raise _refuse(text, "a pattern is empty", "name a module, or leave the pattern out")
    parts = [part.strip() for part in _AND.split(text)]
    if not all(parts):
        raise _refuse(text, "a side of & is empty", "write a pattern on both sides of each &")
    parsed = tuple(_part(part) for part in parts)
    return parsed[0] if len(parsed) == 1 else _And(" & ".join(map(str, parsed)), parsed)


def _part(text: str) -> Pattern:
    # Counted, not recursed: any number of signs is legal.
    signs = _SIGNS.match(text)
    body = text[signs.end() :] if signs else text
    if not body:
        raise _refuse(text, "nothing follows !", "write the pattern to exclude after !")
    pattern = _atom(body)
    negations = text[: len(text) - len(body)].count("!")
    for _ in range(negations if negations < 2 else 2 - negations % 2):
        pattern = _Not(f"!{pattern}", pattern)
    return pattern


def _atom(text: str) -> Pattern:
    kind, colon, value = text.partition(":")
    if not colon:
        if not any(sign in text for sign in "*?["):
            return _Name(text)
        glob, literals = _glob(text)
        return _Regex(text, _compile(text, glob), (4, literals))
    if kind not in _KINDS:
        fix = suggestion(kind, _KINDS, form="{}:") or "use re:, cls:, layers: or role:"
        raise _refuse(text, f"{kind!r} is no kind of pattern", fix)
    value = value.strip()
    if not value:
        raise _refuse(text, f"nothing follows {kind}:", f"write {_KINDS[kind]}, for example")
    if kind == "re":
        return _Regex(text, _compile(text, value), (3, len(value)))
    if kind == "cls":
        return _Class(text, value)
    if kind == "layers":
        return _Layers(text, _ranges(text, value))
    if value not in ROLES:
        near = suggestion(value.lower(), ROLES, form="role:{}")
        fix = near or f"use one of {', '.join(ROLES)}"
        raise _refuse(text, f"{value!r} is no role", fix)
    return _Role(text, value)


def _compile(text: str, body: str) -> re.Pattern[str]:
    try:
        return re.compile(body)
    except (re.error, OverflowError, RecursionError) as error:
        raise _refuse(
            text, f"not a regular expression: {error}", "correct it at that position"
        ) from None


def _glob(text: str) -> tuple[str, int]:
    """The regular expression of a glob, and how many literal characters it has."""
    out, index, literals = "", 0, 0
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
            out += _bracket(text, text[index + 1 : end])
            # More than `?`, at most as much as a character: not the length of the list.
            literals += 1
            index = end
        else:
            out += re.escape(char)
            literals += 1
        index += 1
    return out, literals


def _bracket(text: str, body: str) -> str:
    negated = body.startswith(("!", "^"))
    out = ""
    for low, high, single in re.findall(r"(?s)(.)-(.)|(.)", body[negated:]):
        if low > high:
            raise _refuse(text, f"the range {low}-{high} is reversed", f"write [{high}-{low}]")
        out += f"{re.escape(low)}-{re.escape(high)}" if low else re.escape(single)
    if not out:
        raise _refuse(text, f"[{body}] allows no character", "name some in the bracket")
    # Like `*` and `?`, a negated bracket stays within a component.
    return f"[^.{out}]" if negated else f"[{out}]"


def _ranges(text: str, value: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(-?[0-9]{1,9})(?:-(-?[0-9]{1,9}))?\s*", part)
        if match is None:
            raise _refuse(text, f"{part!r} is no layer or range", "write layers:0-3,-1")
        first = int(match.group(1))
        last = int(match.group(2)) if match.group(2) else first
        # Of unlike signs, only the number of layers tells.
        if first > last and (first < 0) == (last < 0):
            raise _refuse(text, f"{part.strip()!r} is reversed", f"write layers:{last}-{first}")
        found.append((first, last))
    return tuple(found)
