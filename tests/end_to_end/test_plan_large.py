"""A plan of a large model reads headers only: its memory is bounded and its totals are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def benchmark(script: Script) -> ModuleType:
    return script("benchmarks/plan.py")


@pytest.mark.parametrize(("name", "weights"), [("70b", 70_553_706_496), ("405b", 405_853_388_800)])
def test_memory_and_totals(benchmark: ModuleType, tmp_path: Path, name: str, weights: int) -> None:
    folder = benchmark.fabricate(tmp_path / "llama", name)
    assert len(list(folder.glob("*.safetensors"))) == benchmark.SHARDS[name]
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    assert on_disk < 50e6, "the shards are sparse, or this test would fill the disk"
    run = benchmark.measure(folder, "bnb-nf4")
    # It does not fit into this machine's memory, presumably: nothing else may be wrong.
    assert [text for text in run["errors"] if "QM-MEMORY-001" not in text] == []
    assert run["peak"] < 100e6, f"planning took {run['peak'] / 1e6:.0f} MB above the imports"

    totals, config = run["totals"], benchmark.config_of(name)
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, key = config["num_hidden_layers"], 8 * 128
    assert totals["parameters"] == benchmark.parameters(config) == weights
    assert totals["bytes_before"] == 2 * weights
    assert totals["quantized"] == layers * 7
    # Two codes a byte and a float32 scale per 64 weights; a table and a state per matrix.
    layer = 2 * hidden * hidden + 2 * key * hidden + 3 * inner * hidden
    exact = layers * (layer // 2 + 4 * layer // 64)
    floats = 2 * (2 * vocab * hidden + (2 * layers + 1) * hidden)
    assert exact + floats < totals["bytes_after"] < exact + floats + layers * 7 * 300
    assert totals["bits_per_weight"] == pytest.approx(4.5, abs=1e-4)
