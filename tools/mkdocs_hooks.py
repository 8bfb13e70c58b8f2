"""Documentation that is generated from the code while mkdocs builds: the table of finding codes.

The codes are read from the sources, not by importing them, so the documentation builds without
torch: every ``declare("QM-AREA-000", "title", ...)`` in any package is a row.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("core/src", "plugins/*/src", "integrations/*/src")

HEADER = """\
# Findings

A finding has a stable code, a severity, a place, a cause and a fix. An *error* stops the job before
anything is written. A *fallback* says that something slower or larger is used than was asked;
with `--strict` it is an error. This table is generated from the declarations in the code.

| code | severity | meaning | declared in |
|---|---|---|---|
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to the site."""
    rows = "".join(
        f"| `{code}` | {severity} | {title} | `{module}` |\n"
        for code, severity, title, module in sorted(declarations())
    )
    files.append(File.generated(config, "reference/findings.md", content=HEADER + rows))
    return files


def declarations() -> Iterator[tuple[str, str, str, str]]:
    """Code, severity, title and module of every declared finding."""
    for pattern in SOURCES:
        for source in ROOT.glob(pattern):
            for path in source.rglob("*.py"):
                module = ".".join(path.relative_to(source).with_suffix("").parts)
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.Call) and (row := _declaration(node)):
                        yield *row, module.removesuffix(".__init__")


def _declaration(call: ast.Call) -> tuple[str, str, str] | None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name != "declare" or len(call.args) < 2:
        return None
    code, title, *rest = call.args
    if not (isinstance(code, ast.Constant) and isinstance(title, ast.Constant)):
        return None
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    severity = rest[0] if rest else keywords.get("severity")
    text = severity.attr.lower() if isinstance(severity, ast.Attribute) else "error"
    fallback = keywords.get("fallback")
    if isinstance(fallback, ast.Constant) and fallback.value is True:
        text += ", fallback"
    return str(code.value), text, str(title.value).replace("|", "\\|")
