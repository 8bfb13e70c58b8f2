"""Renew docs/reference/configs.md, every field of every method; a test says when it is out of date.

    python tools/config_reference.py

The page holds what ``quantmill schema`` prints, and needs all packages of the workspace installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantmill.api import method_schema
from quantmill.host import default_host

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "configs.md"

HEAD = """\
# Configs of the methods

Every field that a method can be told, with its type, its default and what it means: what
`quantmill schema METHOD` prints, as a table. This page is generated from the code.

A field is an option of METHOD (`gptq-4:group_size=32`), a key of a method file, and a key of the
`quantization_config` that is written: see [sources and methods](../methods.md). Short names are
configs with some fields set. Fields without a description are the peer's own, with the meaning that
they have there; [migration](../migration.md) sets them side by side.
"""


def page() -> str:
    """The whole page."""
    found = sorted(default_host().methods.items())
    return HEAD + "".join(part for name, method in found for part in section(name, method))


def section(name: str, method: Any) -> Iterator[str]:
    """One method: summary, short names, fields, and those of its nested objects."""
    schema = method_schema(name)
    yield f"\n## {name}\n\n{method.summary}.\n\n"
    if method.presets:
        yield "| short name | sets | what it is |\n|---|---|---|\n"
        for preset in method.presets:
            sets = ", ".join(f"`{key}`: {value(item)}" for key, item in preset.options.items())
            yield f"| `{preset.name}` | {sets or 'nothing'} | {cell(preset.summary)} |\n"
        yield "\n"
    yield from fields(schema)
    for nested, inner in schema.get("$defs", {}).items():
        yield f"\n### {name}: {nested}\n\n{cell(inner.get('description', ''))}\n\n"
        yield from fields(inner)


def fields(schema: Mapping[str, Any]) -> Iterator[str]:
    """The rows of one object."""
    yield "| field | type | default | what it means |\n|---|---|---|---|\n"
    for name, item in schema.get("properties", {}).items():
        default = value(item["default"]) if "default" in item else "not set"
        yield f"| `{name}` | {kind(item)} | {default} | {cell(item.get('description', ''))} |\n"


def kind(item: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "anyOf" in item:
        return " or ".join(kind(part) for part in item["anyOf"])
    if "$ref" in item:
        return str(item["$ref"]).rpartition("/")[2]
    if "const" in item:
        return value(item["const"])
    if "enum" in item:
        return ", ".join(value(part) for part in item["enum"])
    name = str(item.get("type", "anything"))
    if "prefixItems" in item:
        return f"array of {len(item['prefixItems'])}: {', '.join(map(kind, item['prefixItems']))}"
    if item.get("items"):
        name = f"array of {kind(item['items'])}"
    bounds = [
        f"{sign} {item[key]}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in item
    ]
    return " ".join([name, *([", ".join(bounds)] if bounds else [])])


def value(item: Any) -> str:
    """A value as it stands in JSON."""
    return f"`{json.dumps(item)}`"


def cell(text: str) -> str:
    """Prose of a docstring in a cell."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def main() -> int:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
