"""What ``from_pretrained`` of every framework shares: where files come from, options of ours,
what can't be honoured, what a job's methods are able to do, and a bar for progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantmill.findings import Finding, FindingCode, QuantmillError, declare

if TYPE_CHECKING:
    from quantmill.job import Job

__all__ = [
    "CANT_HONOUR",
    "HUB",
    "OPTIONS",
    "Bar",
    "all_capable",
    "check_dequantizable",
    "locate_source",
    "options_of",
    "read_dtype",
    "refuse",
]

CANT_HONOUR = declare("QM-TAKE-011", "An argument of from_pretrained can't be honoured")
BAD_OPTION = declare("QM-TAKE-012", "quantmill_options has an option that there is not")

HUB: Final = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""Arguments that say where files come from."""

OPTIONS: Final = frozenset(
    {
        "allow_unmatched",
        "calibration",
        "dequantize",
        "gradient_checkpointing",
        "include",
        "length",
        "non_finite",
        "samples",
        "seed",
        "skip",
        "strict",
        "training",
    }
)
"""Options of :func:`quantmill.load` that ``quantmill_options`` may hold."""

Asked = Callable[[Any], bool]


def options_of(value: Mapping[str, Any] | None, problems: list[Finding]) -> dict[str, Any]:
    """``quantmill_options``, checked."""
    given = dict(value or {})
    for name in sorted(given.keys() - OPTIONS):
        problems.append(
            BAD_OPTION(name, f"{name!r} is no option", f"use some of: {', '.join(sorted(OPTIONS))}")
        )
    return given


def refuse(
    rest: dict[str, Any], table: Mapping[str, tuple[Asked, str]], problems: list[Finding]
) -> None:
    """Take the arguments of ``table`` out of ``rest``; those that ask for something are found."""
    for name, (asked, why) in table.items():
        if asked(rest.pop(name, None)):
            problems.append(
                CANT_HONOUR(
                    name,
                    f"{why}, so that {name} has no way to be honoured",
                    f"leave {name} out, or load without quantmill: deactivate()",
                )
            )


def read_dtype(value: Any, problems: list[Finding]) -> str | None:
    """The name of a single dtype; None for ``auto`` and for None."""
    import torch

    if value is None or value == "auto":
        return None
    if isinstance(value, torch.dtype | str):
        return str(value).removeprefix("torch.")
    problems.append(
        CANT_HONOUR("dtype", f"{value!r} is no single dtype", "give one dtype for the whole model")
    )
    return None


def locate_source(source: Any, hub: Mapping[str, Any], patterns: Sequence[str]) -> str:
    """The folder, or the Hub id with its revision. ``hub`` holds those of :data:`HUB` that were
    given; where they say more than a source can, ``patterns`` are downloaded."""
    others = {name: value for name, value in hub.items() if name != "subfolder"}
    subfolder = hub.get("subfolder", "")
    if Path(source).is_dir():
        return str(Path(source) / subfolder)
    if not subfolder and not others.keys() - {"revision"}:
        revision = others.get("revision")
        return f"{source}@{revision}" if revision else str(source)
    from huggingface_hub import snapshot_download

    if subfolder:
        patterns = [f"{subfolder}/{pattern}" for pattern in patterns]
    folder = snapshot_download(str(source), allow_patterns=list(patterns), **others)
    return str(Path(folder) / subfolder)


def all_capable(job: Job, capability: str) -> bool:
    """Whether every method of a job declares a capability, by the name of its field."""
    methods = [item.method for item in job.selections.values()]
    return all(getattr(method.capabilities, capability) for method in methods)


def check_dequantizable(job: Job, code: FindingCode) -> None:
    """Refuse what a method declares that it can't do.

    Raises:
        QuantmillError: a finding of ``code`` about the first such method.
    """
    for item in job.selections.values():
        if not item.method.capabilities.dequantizable:
            raise QuantmillError(
                code(
                    item.label,
                    f"{item.method.name} declares that its weights can't be made float",
                    "load the float checkpoint",
                )
            )


class Bar:
    """A framework's own progress bar, which its settings switch off."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """``make`` is the framework's ``tqdm``."""
        self._make = make
        self._bar: Any = None
        self._done = 0  # Switched off, the library's bar has no count of its own.

    def __call__(self, done: int, total: int, what: str) -> None:
        """Progress as a job tells it."""
        if self._bar is None:
            self._bar = self._make(
                total=total, desc="Loading weights with quantmill", unit="B", unit_scale=True
            )
        self._bar.update(done - self._done)
        self._done = done
        if done >= total:
            self._bar.close()
