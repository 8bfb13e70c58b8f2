"""Make this copy of the template your own: ``python rename.py NAME``, once.

NAME is that of your method in lower case, ``mymethod`` or ``my-method``. Package, classes, short
names, finding codes and the entry point are called after it; the part of README.md about the
template goes, and this file too.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TEXT = {".py", ".toml", ".md"}


def words(name: str) -> dict[str, str]:
    """What is replaced by what, the longer before what it contains.

    Raises:
        ValueError: the name can't be that of a package.
    """
    name = name.removeprefix("quantmill-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name == "example":
        raise ValueError(f"{name!r} is no name: use small letters, digits and single hyphens")
    parts = name.split("-")
    return {
        "quantmill_example": "quantmill_" + "_".join(parts),
        "EXAMPLE": "".join(parts).upper(),
        "Example": "".join(part.capitalize() for part in parts),
        "example": name,
    }


def rename(folder: Path, name: str) -> None:
    """Rename everything in ``folder``, a copy of the template.

    Raises:
        ValueError: bad name, not a fresh copy, or the template of quantmill's own repository.
    """
    replaced = words(name)
    package = folder / "src" / "quantmill_example"
    if not package.is_dir():
        raise ValueError("there is no src/quantmill_example here: it was renamed already")
    if (folder.parent / "core" / "src" / "quantmill").is_dir():
        raise ValueError("this is the template itself: copy the folder to a place of its own")
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix not in TEXT or path == folder / "rename.py":
            continue
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"<!-- template -->.*?<!-- /template -->\n", "", text, flags=re.DOTALL)
        # In one go: the new name may contain the old one.
        text = re.sub("|".join(replaced), lambda match: replaced[match.group()], text)
        path.write_text(text, encoding="utf-8")
    package.rename(package.with_name(replaced["quantmill_example"]))
    (folder / "rename.py").unlink()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of your method, such as mymethod")
    name = parser.parse_args().name
    try:
        rename(FOLDER, name)
    except ValueError as error:
        print(f"rename.py: {error}", file=sys.stderr)
        return 1
    print(f"quantmill-{name.removeprefix('quantmill-')} is ready. Next:")
    print('  pip install -e ".[test]" && pytest')
    return 0


if __name__ == "__main__":
    sys.exit(main())
