"""A new plugin from the template that is shipped with the core: ``quantmill new-plugin``.

The template is a working backend called ``example``. A copy has that word replaced, in each of the
spellings that Python, packages and finding codes want.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantmill.findings import QuantmillError, declare
from quantmill.host import Host, default_host

__all__ = ["NewPlugin", "new_plugin"]

BAD_NAME = declare("QM-NEW-001", "A name can't be that of a plugin")
TAKEN = declare("QM-NEW-002", "The name of a new plugin is taken")
IN_THE_WAY = declare("QM-NEW-003", "A new plugin can't be put there")

TEMPLATE: Final = Path(__file__).parent / "template"
_LONGEST: Final = 40
_WASTE: Final = shutil.ignore_patterns("__pycache__", "*.pyc", ".*_cache", ".venv", "dist", "build")


@dataclass(frozen=True, slots=True)
class NewPlugin:
    """A package that was made."""

    name: str
    """Of the plugin, the method and its entry point."""
    folder: Path
    files: tuple[str, ...]
    """Relative to ``folder``."""
    next: tuple[str, ...]
    """Shell commands, to be run in ``folder``."""


def new_plugin(name: str, into: Path, *, host: Host | None = None) -> NewPlugin:
    """Make the package ``quantmill-NAME`` in the folder ``into``.

    Raises:
        QuantmillError: the name can't be used, or the package's folder exists. Nothing is written.
    """
    replaced = _words(name)
    short = replaced["example"]
    _free(short, host or default_host())
    folder = into / f"quantmill-{short}"
    if folder.exists() or folder.is_symlink():
        fix = "take another name, or another place with --into"
        raise QuantmillError(IN_THE_WAY(str(folder), "it is there already", fix))
    unfinished = into / f".{folder.name}.unfinished"
    try:
        into.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(TEMPLATE, unfinished, ignore=_WASTE)
        _rename(unfinished, replaced)
        unfinished.rename(folder)
    except OSError as error:
        cause = f"{error.strerror or error}"
        raise QuantmillError(IN_THE_WAY(str(folder), cause, "choose another place")) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    files = sorted(str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file())
    return NewPlugin(
        short, folder, tuple(files), ('python -m pip install -e ".[test]"', "python -m pytest")
    )


def _words(name: str) -> dict[str, str]:
    """What is replaced by what, the longer before what it contains."""
    short = name.removeprefix("quantmill-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", short) or len(short) > _LONGEST:
        suggested = re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-0123456789")[:_LONGEST]
        fix = "use small letters, digits and single hyphens, a letter first"
        fix += f", for example {suggested.strip('-')}" if suggested.strip("-") else ""
        cause = "no package can be called that"
        if len(short) > _LONGEST:
            cause = f"it has more than {_LONGEST} characters"
        raise QuantmillError(BAD_NAME(repr(name), cause, fix))
    if short in ("example", "testing"):
        raise QuantmillError(BAD_NAME(repr(name), "the word has a meaning here", "take another"))
    parts = short.split("-")
    return {
        "quantmill_example": "quantmill_" + "_".join(parts),
        "EXAMPLE": "".join(parts).upper(),
        "Example": "".join(part.capitalize() for part in parts),
        "example": short,
    }


def _free(name: str, host: Host) -> None:
    """Raise where an installed plugin has the name, or one of the names that would follow."""
    owner = host.plugins.get(name)
    taken = f"plugin {owner.name} of {owner.distribution}" if owner is not None else ""
    for made in (name, f"{name}-4", f"{name}-8"):
        plugin = host.plugin_of("methods", made)
        if not taken and plugin is not None:
            taken = f"method {made} of plugin {plugin}"
    if taken:
        fix = "take another name: two plugins of one name can't be used together"
        raise QuantmillError(TAKEN(name, f"{taken} is installed", fix))


def _rename(folder: Path, replaced: dict[str, str]) -> None:
    word = re.compile("|".join(replaced))
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "LICENSE":
            text = path.read_text(encoding="utf-8")
            # In one go: the new name may contain the old one.
            path.write_text(word.sub(lambda m: replaced[m.group()], text), encoding="utf-8")
    package = folder / "src" / "quantmill_example"
    package.rename(package.with_name(replaced["quantmill_example"]))
