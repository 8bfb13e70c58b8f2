"""Sources that a plugin reads: single files such as GGUF, found by the ending of their name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.checkpoint import codes
from quantmill.checkpoint.source import open_source, read_headers
from quantmill.checkpoint.weights import STEMS
from quantmill.findings import QuantmillError
from quantmill.registrations import resolve
from quantmill.requirements import missing_requirements

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders
    from quantmill.host import Host
    from quantmill.registrations import Container

__all__ = ["container_for", "container_of", "open_checkpoint"]


def container_of(spec: str | Path | Any, host: Host) -> Container | None:
    """The registered file format that ``spec`` is an existing file of, or None."""
    if not isinstance(spec, str | Path) or not Path(spec).is_file():
        return None
    return container_for(spec, host)


def container_for(path: str | Path, host: Host) -> Container | None:
    """The registered file format that a file of this name would have, or None."""
    name = Path(path).name.lower()
    for container in host.containers:
        if name.endswith(container.suffixes) and not missing_requirements(container.requirements):
            return container
    return None


def _inside(spec: str | Path | Any, host: Host) -> tuple[Container, Path] | None:
    """The file of a registered format that is the checkpoint of a folder, or None."""
    if not isinstance(spec, str | Path) or not any(item.in_folder for item in host.containers):
        return None
    folder = Path(spec)
    if not folder.is_dir() or any(any(folder.glob(f"{stem}*.safetensors*")) for stem in STEMS):
        return None
    for container in host.containers:
        for name in container.in_folder:
            if (folder / name).is_file() and not missing_requirements(container.requirements):
                return container, folder / name
    return None


def open_checkpoint(spec: str | Path | Any, host: Host) -> CheckpointHeaders:
    """The headers of what a user wrote as SOURCE, or of an open source.

    Raises:
        QuantmillError: nothing is there, or it can't be read.
    """
    container = container_of(spec, host)
    if container is not None:
        headers: CheckpointHeaders = resolve(container.read)(Path(spec))
        return headers
    inside = _inside(spec, host)
    if inside is not None:
        found: CheckpointHeaders = resolve(inside[0].read)(inside[1])
        return found
    if isinstance(spec, str | Path):
        return read_headers(open_source(spec))
    if not all(hasattr(spec, name) for name in ("names", "exists", "identity")):
        fix = "give the path of a folder or file, or a Hub id"
        if hasattr(spec, "named_modules"):
            fix = "quantmill.quantize_model(model, method) quantizes a module that is in memory"
        kind = type(spec).__name__
        raise QuantmillError(codes.NO_SOURCE("source", f"it is a {kind}, not a path", fix))
    return read_headers(spec)
