"""Findings: what is wrong or worth knowing, with its cause and its fix.

A *finding* is data. Stages collect findings and report all of them at once; an error among them
stops the job before anything is written. Exceptions of this project carry findings, so the
command line, a framework and a test read the same thing.

Codes are stable: ``QM-<AREA>-<NUMBER>``. Each code is declared once with :func:`declare`, next to
the code that raises it; the documentation's table is generated from the declarations.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

__all__ = [
    "CODES",
    "Finding",
    "FindingCode",
    "Findings",
    "FindingsError",
    "QuantmillError",
    "Severity",
    "declare",
]


class Severity(enum.StrEnum):
    """How much a finding matters. Only ``ERROR`` stops a job."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class FindingCode:
    """The declaration of one code: its meaning, independent of any occurrence."""

    code: str
    title: str
    severity: Severity
    fallback: bool = False
    """True when the finding reports that something slower or larger is used instead of what was
    asked. Strict mode turns such findings into errors."""

    def __call__(self, where: str, cause: str, fix: str, **data: Any) -> Finding:
        """Make an occurrence. ``data`` holds JSON-able details for programs."""
        return Finding(self.code, self.severity, where, cause, fix, dict(data))


CODES: Final[dict[str, FindingCode]] = {}
_CODE = re.compile(r"QM-[A-Z0-9]+-\d{3}")


def declare(
    code: str, title: str, severity: Severity = Severity.ERROR, *, fallback: bool = False
) -> FindingCode:
    """Declare a finding code once; plugins use their own area (``QM-BNB-001``).

    Raises:
        ValueError: the code is malformed or already declared with another meaning.
    """
    if not _CODE.fullmatch(code):
        raise ValueError(f"finding code {code!r} is not of the form QM-AREA-000")
    new = FindingCode(code, title, severity, fallback)
    if CODES.setdefault(code, new) != new:
        raise ValueError(f"finding code {code} is already declared as {CODES[code].title!r}")
    return new


@dataclass(frozen=True, slots=True)
class Finding:
    """One occurrence: a code, where it is, why it is so, and what to do about it."""

    code: str
    severity: Severity
    where: str
    cause: str
    fix: str
    data: dict[str, Any] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON-able data."""
        return {**asdict(self), "severity": self.severity.value}

    def __str__(self) -> str:
        place = f" {self.where}:" if self.where else ""
        fix = f" Fix: {self.fix}" if self.fix else ""
        return f"[{self.code}]{place} {self.cause}{fix}"


class Findings:
    """An ordered collection of findings without exact repeats."""

    def __init__(self, items: Iterable[Finding] = ()) -> None:
        self._items: list[Finding] = []
        self.extend(items)

    def add(self, finding: Finding) -> None:
        """Append a finding unless an equal one is already there."""
        if finding not in self._items:
            self._items.append(finding)

    def extend(self, findings: Iterable[Finding]) -> None:
        """Append several findings."""
        for finding in findings:
            self.add(finding)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop a job."""
        return [item for item in self._items if item.severity is Severity.ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """The findings a user should see although the job goes on."""
        return [item for item in self._items if item.severity is Severity.WARNING]

    def strict(self) -> Findings:
        """The same findings with every fallback made an error."""

        def harden(item: Finding) -> Finding:
            declared = CODES.get(item.code)
            if declared is None or not declared.fallback:
                return item
            return Finding(item.code, Severity.ERROR, item.where, item.cause, item.fix, item.data)

        return Findings(harden(item) for item in self._items)

    def raise_errors(self) -> None:
        """Raise :class:`FindingsError` with every error, if there is one."""
        if self.errors:
            raise FindingsError(self.errors)

    def to_list(self) -> list[dict[str, Any]]:
        """All findings as JSON-able data."""
        return [item.to_dict() for item in self._items]


class QuantmillError(Exception):
    """Base of every error this project raises on purpose. ``findings`` says what and why."""

    def __init__(self, *findings: Finding) -> None:
        self.findings: tuple[Finding, ...] = findings
        super().__init__("\n".join(str(item) for item in findings))


class FindingsError(QuantmillError):
    """One or more findings of severity error; all of them are in ``findings``."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        super().__init__(*findings)
