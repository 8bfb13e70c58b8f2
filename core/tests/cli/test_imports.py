"""Start-up stays light: no model library is imported before a command needs one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "numpy",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "yaml",
}
SCRIPT = """
import json, sys
from quantmill.cli import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as stop:
    roots = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps([stop.code, roots]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["plugins"], 0),
        (["plugins", "--json"], 0),
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["plan", "--help"], 0),
        (["quantize", "--help"], 0),
        (["eval", "--help"], 0),
        (["generate", "--help"], 0),
        (["kernels", "--help"], 0),
        (["plan", "--memory", "x", "--json"], 2),
        (["plna"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_nothing_heavy_is_imported(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    found, roots = json.loads(done.stderr.splitlines()[-1])
    assert found == code
    assert not HEAVY & set(roots)
