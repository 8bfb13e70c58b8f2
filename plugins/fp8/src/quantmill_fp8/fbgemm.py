"""FBGEMM, an optional library: which of its versions goes with the installed PyTorch.

It is built against one minor version of PyTorch, and with another its import fails or crashes: so
versions are compared before anything is imported.
"""

from __future__ import annotations

from importlib import metadata

__all__ = ["NAMES", "installed", "problem", "wanted"]

NAMES = ("fbgemm-gpu", "fbgemm-gpu-genai", "fbgemm-gpu-cpu")
"""Distributions that hold the library, each for other devices."""


def installed() -> tuple[str, str] | None:
    """Name and version of the distribution that is there, or None. Nothing is imported."""
    for name in NAMES:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def wanted(torch_version: str | None = None) -> str | None:
    """The version for a version of PyTorch (the installed one): 1.8 goes with 2.13, and each minor
    version with the next. None where that can't be said."""
    if torch_version is None:
        torch_version = metadata.version("torch")
    parts = torch_version.split("+")[0].split(".")
    if len(parts) < 2 or parts[0] != "2" or not parts[1].isdigit() or int(parts[1]) < 6:
        return None
    return f"1.{int(parts[1]) - 5}.0"


def problem(torch_version: str | None = None) -> tuple[str, str] | None:
    """Why FBGEMM can't be used, and what to do; None where it can."""
    need = wanted(torch_version)
    found = installed()
    version = torch_version or metadata.version("torch")
    if need is None:
        return f"no version of it is known to go with PyTorch {version}", "use PyTorch's products"
    if found is None:
        return "it is not installed", f'pip install "fbgemm-gpu=={need}"'
    name, have = found
    if have.split("+")[0].split(".")[:2] != need.split(".")[:2]:
        return (
            f"{name} {have} is built against another PyTorch than {version}",
            f'pip install "{name}=={need}"',
        )
    return None
