"""transformers' packages are the same, however they were imported."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import json, sys
from pathlib import Path
from quantmill_transformers.start import import_models, known_structure
import transformers
from transformers.utils import import_utils

if sys.argv[1] == "other":
    import_utils.define_import_structure = import_utils.define_import_structure.__wrapped__
define = import_utils.define_import_structure
import_models()
assert import_utils.define_import_structure is define
models = sys.modules["transformers.models"]
folder = Path(transformers.__file__).parent / "models"
if sys.argv[1] == "known":
    assert define.cache_info().misses == 1, define.cache_info()
    known = known_structure(define(folder, prefix="models"))
    plain = define.__wrapped__(str(folder / "__init__.py"))
    assert known == plain and len(plain) > 3
    assert known is not plain
import_models()
assert sys.modules["transformers.models"] is models
from transformers.models.llama.modeling_llama import LlamaForCausalLM
assert transformers.LlamaForCausalLM is LlamaForCausalLM
print(len(dir(models)))
"""


def run(kind: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_models_files_are_looked_through_once_and_nothing_is_missing() -> None:
    count = run("known")
    assert count > 300
    # A version whose function is another is left alone.
    assert run("other") == count
