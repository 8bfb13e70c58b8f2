#!/usr/bin/env bash
# Builds source distribution and wheel of every package, installs the wheels into a clean
# environment that sees nothing of the tree, and runs tests/dist there.
#   tools/dist.sh [FOLDER]       wheels go to FOLDER/wheels (default: build/dist)
# The calling Python ($PY) needs the dependency group `build`.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
PY=${PY:-python}
work=${1:-build/dist}

mkdir -p "$work"
work=$(cd "$work" && pwd)
rm -rf "$work/wheels" "$work/clean"

packages=(core plugins/*/ integrations/*/)
for package in "${packages[@]}"; do
    echo "building ${package%/}"
    "$PY" -m build --no-isolation --outdir "$work/wheels" "$package" >"$work/build.log" 2>&1 ||
        { cat "$work/build.log"; exit 1; }
done
ls -l "$work/wheels"

"$PY" -m venv "$work/clean"
clean=$work/clean/bin/python
install=("$clean" -m pip install -qq -c "$root/constraints.txt")
"${install[@]}" pip
"${install[@]}" torch
# The extra `all` names the plugins; they are given as files so that no index is asked for them.
core=("$work"/wheels/quantmill-[0-9]*.whl)
others=("$work"/wheels/quantmill_*.whl)
"${install[@]}" "${core[0]}[all]" "${others[@]}"
"${install[@]}" --group "$root/pyproject.toml:test"
"$clean" -m pip check

cd "$work"
QUANTMILL_DIST=1 "$clean" -m pytest -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider "$root/tests/dist"
