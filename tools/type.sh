#!/usr/bin/env bash
# mypy over every package's sources: strict for the core, relaxed for the rest (pyproject.toml).
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python}

"$PY" -m mypy core/src plugins/*/src integrations/*/src examples/*/src
