"""One plugin that discovery found, and what became of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["PluginInfo", "Status", "unusable_words"]


class Status(enum.StrEnum):
    """What became of a plugin."""

    OK = "ok"
    DISABLED = "disabled"
    MISSING = "missing requirement"
    WRONG_API = "wrong API version"
    CONFLICT = "conflict"
    BROKEN = "broken"


@dataclass(slots=True)
class PluginInfo:
    """One plugin that discovery found, and its fate."""

    name: str
    distribution: str
    version: str
    entry: str
    status: Status = Status.OK
    reason: str = ""
    fix: str = ""
    module: ModuleType | None = field(default=None, repr=False)
    provides: dict[str, list[str]] = field(default_factory=dict)
    rivals: tuple[str, ...] = ()
    """Plugins that take part in a conflict with this one."""

    def to_dict(self) -> dict[str, Any]:
        """The plugin as JSON-able data."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "entry": self.entry,
            "status": self.status.value,
            "reason": self.reason,
            "fix": self.fix,
            "provides": self.provides,
        }


def unusable_words(failed: Sequence[PluginInfo]) -> str:
    """The end of a cause: plugins that may have what is asked for, and can't be used."""
    words = ", ".join(f"{info.name} ({info.status}: {info.reason})" for info in failed)
    return f"; plugins that can't be used: {words}" if words else ""
