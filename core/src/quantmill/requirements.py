"""What this environment has of what is needed, from installed metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata as metadata
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantmill.registrations import Requirement

__all__ = ["missing_requirements", "unmet_metadata"]


def missing_requirements(requirements: Iterable[Requirement]) -> list[tuple[Requirement, str]]:
    """The requirements this environment does not meet, each with what is there instead.

    Metadata only: nothing is imported.
    """
    unmet: list[tuple[Requirement, str]] = []
    for requirement in requirements:
        if not requirement.distribution:
            continue
        found = _version(requirement.distribution)
        if found is None:
            unmet.append((requirement, "it is not installed"))
        elif requirement.versions and not _satisfies(found, requirement.versions):
            unmet.append((requirement, f"version {found} is installed"))
    return unmet


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _satisfies(version: str, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(version, prereleases=True)


def unmet_metadata(distribution: metadata.Distribution) -> list[tuple[str, str]]:
    """Requirements in a distribution's metadata that are not installed, as ``pip`` takes them, each
    with what is there instead; extras are left out."""
    from packaging.requirements import InvalidRequirement, Requirement

    unmet = []
    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        wanted = str(requirement).partition(";")[0].strip()
        if found is None:
            unmet.append((wanted, "it is not installed"))
        elif not requirement.specifier.contains(found, prereleases=True):
            unmet.append((wanted, f"version {found} is installed"))
    return unmet
