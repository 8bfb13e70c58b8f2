"""The way into transformers: its packages are imported here, once they are wanted.

While it is imported, transformers reads the files of all its models to learn what each offers, and
then reads them again for ``transformers.models``: its memory of folders holds 128, and there are
more. That is a sixth of what planning or loading a model waits for at first. What the first reading
found says it all.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantmill.checkpoint.headers import CheckpointHeaders
from quantmill.importing import without_collector

__all__ = ["import_models", "known_structure", "open_folder"]

_PREFIX = "models"


def open_folder(headers: CheckpointHeaders) -> Any:
    """See :func:`quantmill_transformers.architecture.open_folder`."""
    with without_collector():
        import_models()
        from quantmill_transformers import architecture

    return architecture.open_folder(headers)


def import_models() -> None:
    """Import ``transformers.models``; its files are looked through no second time."""
    if "transformers.models" in sys.modules:
        return
    import transformers
    from transformers.utils import import_utils

    define: Any = getattr(import_utils, "define_import_structure", None)
    folder = Path(transformers.__file__).parent / _PREFIX
    # Other versions may look at their files in another way, or not at all.
    if hasattr(define, "cache_info") and define.cache_info().currsize == 1:

        def known(module_path: Any, prefix: str | None = None) -> Any:
            if prefix is None and Path(module_path) == folder / "__init__.py":
                # The same arguments as transformers' own: it remembers the answer.
                return known_structure(define(folder, prefix=_PREFIX))
            return define(module_path, prefix)

        import_utils.define_import_structure = known
        try:
            import transformers.models
        finally:
            import_utils.define_import_structure = define
    else:
        import transformers.models


def known_structure(
    whole: Mapping[Any, Mapping[str, set[str]]],
) -> dict[Any, dict[str, set[str]]]:
    """What transformers offers (names by module, by what these need), less all that is not below
    ``models``, as that package sees it."""
    start = f"{_PREFIX}."
    found = {
        needs: {
            name.removeprefix(start): set(names)
            for name, names in modules.items()
            if name.startswith(start)
        }
        for needs, modules in whole.items()
    }
    return {needs: modules for needs, modules in found.items() if modules}
