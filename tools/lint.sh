#!/usr/bin/env bash
# Style and architecture: ruff's rules and format, and the import contracts of pyproject.toml.
# Needs ruff and import-linter only; the packages are read from the tree, not imported.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python}

"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" tools/import_contracts.py
