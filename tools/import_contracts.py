"""Check the import contracts of pyproject.toml over the sources in the tree, uninstalled."""

from __future__ import annotations

import sys
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Put every package's ``src`` on the path and run import-linter."""
    sources = [ROOT / "core/src", *ROOT.glob("plugins/*/src"), *ROOT.glob("integrations/*/src")]
    sys.path[:0] = [str(path) for path in sources]
    return int(lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True))


if __name__ == "__main__":
    sys.exit(main())
