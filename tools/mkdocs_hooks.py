"""Documentation that is generated from the code while mkdocs builds: finding codes and hooks.

The sources are read, not imported, so the documentation builds without torch or pluggy: every
``declare("QM-AREA-000", "title", ...)`` in any package is a row of the findings, and every function
of ``quantmill/hookspecs.py`` with ``@hookspec`` is a section of the hooks.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("core/src", "plugins/*/src", "integrations/*/src")
REGISTRY = ROOT / "integrations/transformers/src/quantmill_transformers/registry.py"
HOOKSPECS = ROOT / "core/src/quantmill/hookspecs.py"

FINDINGS = """\
# Findings

A finding has a stable code, a severity, a place, a cause and a fix. An *error* stops the job before
anything is written. A *fallback* says that something slower or larger is used than was asked;
with `--strict` it is an error. This table is generated from the declarations in the code.

| code | severity | meaning | declared in |
|---|---|---|---|
"""

HOOKS = """\
# Hooks

This page is generated from `quantmill/hookspecs.py`. The types in the signatures are those of
`quantmill.registrations`, `quantmill.job`, `quantmill.backend` and `quantmill.targeting`;
[writing a backend](../authors/index.md) shows them in use.

"""

REGISTRY_PAGE = """\
# quant_method

What becomes of a checkpoint by the `quant_method` of its `quantization_config`: all keys of
transformers 5.23. This table is generated from the registrations in the code.

| quant_method | read by | or what to do |
|---|---|---|
"""

_SECTION = re.compile(r"^# --- (.+?) -+$", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to the site."""
    files.append(File.generated(config, "reference/findings.md", content=findings_page()))
    files.append(File.generated(config, "reference/hooks.md", content=hooks_page()))
    files.append(File.generated(config, "reference/quant-methods.md", content=registry_page()))
    return files


def registry_page() -> str:
    """What becomes of every ``quant_method``."""
    data = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(REGISTRY.read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign) and node.value is not None
        for target in (node.target,)
        if isinstance(target, ast.Name)
    }
    read = readers()
    rows = []
    for key in data["KEYS"]:
        name = data["SAME"].get(key, key)
        if name in read:
            rows.append(f"| `{key}` | {', '.join(f'`{item}`' for item in read[name])} | |\n")
        else:
            why, instead = data["REFUSED"][key]
            rows.append(f"| `{key}` | refused: {why} | {instead} |\n")
    return REGISTRY_PAGE + "".join(rows)


def readers() -> dict[str, list[str]]:
    """``quant_method`` to the distributions whose dialects read it."""
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("plugins/*/src/*/plugin.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "ConfigReader":
                continue
            for keyword in node.keywords:
                if keyword.arg == "quant_methods":
                    for name in ast.literal_eval(keyword.value):
                        names = found.setdefault(name, [])
                        package = f"quantmill-{path.parents[2].name}"
                        names += [package] if package not in names else []
    return found


def findings_page() -> str:
    """The table of every declared finding."""
    return FINDINGS + "".join(
        f"| `{code}` | {severity} | {title} | `{module}` |\n"
        for code, severity, title, module in sorted(declarations())
    )


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


def hooks_page() -> str:
    """Every hook in the order of the file, under the file's own headings."""
    text = HOOKSPECS.read_text(encoding="utf-8")
    tree = ast.parse(text)
    rest = (ast.get_docstring(tree) or "").partition("\n\n")[2]
    marks = [(text.count("\n", 0, m.start()) + 1, m[1]) for m in _SECTION.finditer(text)]
    parts = [HOOKS, _markdown(rest), "\n"]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not node.decorator_list:
            continue
        while marks and marks[0][0] < node.lineno:
            parts.append(f"\n## {marks.pop(0)[1]}\n")
        parts.append(f"\n### {node.name}\n\n```python\n{_signature(node)}\n```\n\n")
        parts.append(_markdown(ast.get_docstring(node) or "") + "\n")
    return "".join(parts)


def _signature(node: ast.FunctionDef) -> str:
    arguments = [ast.unparse(item) for item in node.args.args]
    returns = ast.unparse(node.returns) if node.returns is not None else "None"
    line = f"def {node.name}({', '.join(arguments)}) -> {returns}"
    if len(line) <= 88:
        return line
    inner = "".join(f"    {item},\n" for item in arguments)
    return f"def {node.name}(\n{inner}) -> {returns}"


def _markdown(docstring: str) -> str:
    """The little reStructuredText that our docstrings use, as Markdown."""
    text = _ROLE.sub(r"`\1`", inspect.cleandoc(docstring)).replace("``", "`")
    text = re.sub(r"^(Returns|Raises|Args):\n\s+", r"**\1:** ", text, flags=re.MULTILINE)
    # Continuation lines of a list item need the indentation that Markdown asks for.
    return re.sub(r"^   (?=\S)", "    ", text, flags=re.MULTILINE)
