"""The promise of the streaming loader, measured: the peak of a process that loads a model.

Memory above imports is at most 1.15 times the planned model and 64 MiB, and what comes on top of
the model does not depend on how many layers it has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import quantmill
from quantmill.testing.fabricate import llama_config, llama_shapes

pytest.importorskip("quantmill_bnb")
pytest.importorskip("quantmill_transformers")
pytestmark = pytest.mark.slow
MIB = 1 << 20
PROBE = """
import json, sys
import torch, transformers, bitsandbytes
import transformers.models.llama.modeling_llama
import quantmill, quantmill.api, quantmill.stages.replace, quantmill.stages.write
import quantmill.stages.finalize, quantmill_bnb.quantizer, quantmill_bnb.linear
import accelerate.hooks, quantmill_transformers.pretrained
from quantmill.host import default_host
from quantmill.testing.memory import PeakMemory

default_host()
source, method, output, folder = (None if item == "-" else item for item in sys.argv[1:])
quantmill_transformers.activate("*")
with PeakMemory() as memory:
    if folder is not None:
        split = {"": "cpu", **{f"model.layers.{index}": "disk" for index in range(1, 16)}}
        options = {} if folder == "whole" else {"device_map": split, "offload_folder": folder}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=method, **options
        )
        if options:
            with torch.inference_mode():
                model(input_ids=torch.tensor([[5, 6, 7]]))
        plan = model.quantmill_job.plan
    elif output is None:
        model = quantmill.load(source, method)
        plan = model.quantmill_job.plan
    else:
        plan = quantmill.quantize(source, output, method).plan
print(json.dumps({"above": memory.bytes, **plan.totals}))
"""


def fabricate(folder: Path, layers: int) -> Path:
    """A Llama of 14 MiB a layer in bfloat16; the layers share their values, the files are real."""
    config = llama_config(
        hidden=768, inner=2048, layers=layers, vocab=8000, heads=12, dtype="bfloat16"
    )
    shapes = llama_shapes(config)
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], torch.Tensor] = {}
    for shape in shapes.values():
        if shape not in made:
            made[shape] = (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
    folder.mkdir(parents=True)
    tensors = {name: made[shape].clone() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def probe(
    source: Path, method: str = "-", output: Path | str = "-", folder: Path | str = "-"
) -> dict[str, int]:
    """What a process of its own needs to load ``source``. With a ``folder`` it is transformers'
    ``from_pretrained`` that loads: layers go to the disk there, or ``whole`` into memory."""
    command = [sys.executable, "-c", PROBE, str(source), method, str(output), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("memory")
    return {layers: fabricate(root / str(layers), layers) for layers in (4, 16)}


def bounded(found: dict[str, int]) -> bool:
    return found["above"] <= 1.15 * found["bytes_memory"] + 64 * MIB


@pytest.fixture(scope="module")
def large(folders: dict[int, Path]) -> dict[str, int]:
    return probe(folders[16], "bnb-nf4")


def test_nf4_on_the_fly_stays_within_the_promise(large: dict[str, int]) -> None:
    assert 200 * MIB < large["bytes_before"] < 300 * MIB
    assert large["bytes_memory"] < large["bytes_before"] / 2
    assert bounded(large)
    # The quantized part at least is in memory; embedding and head are mapped and not yet used.
    assert large["above"] > 0.5 * large["bytes_memory"]


def test_what_comes_on_top_does_not_grow_with_the_layers(
    large: dict[str, int], folders: dict[int, Path]
) -> None:
    few = probe(folders[4], "bnb-nf4")
    assert bounded(few)
    on_top = [found["above"] - found["bytes_memory"] for found in (few, large)]
    assert abs(on_top[1] - on_top[0]) < 16 * MIB


def test_writing_keeps_nothing_and_loading_the_result_is_bounded(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    written = probe(folders[16], "bnb-nf4-dq", tmp_path / "out")
    assert written["above"] < 64 * MIB
    assert bounded(probe(tmp_path / "out"))


def test_from_pretrained_stays_within_the_promise(
    large: dict[str, int], folders: dict[int, Path]
) -> None:
    found = probe(folders[16], "bnb-nf4", folder="whole")
    assert bounded(found)
    assert found["bytes_memory"] == large["bytes_memory"]


def test_layers_on_the_disk_take_no_memory(folders: dict[int, Path], tmp_path: Path) -> None:
    found = probe(folders[16], "bnb-nf4", folder=tmp_path / "off")
    # Fifteen of sixteen layers: what computes with one is made and dropped.
    assert found["above"] < 0.5 * found["bytes_memory"] + 64 * MIB


# Tensors are mapped one by one: what is measured is what is held, without the holes of a heap,
# which are 5 MiB in one process and 40 MiB in the next.
MAPPED = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
CONVERT = """
import sys
import quantmill
from quantmill.testing.memory import PeakMemory

few, source, output, method = sys.argv[1:]
options = {"allow_requantize": True, "max_shard_bytes": 8 << 20}
quantmill.convert(few, f"{output}-first", method, **options)  # imports
with PeakMemory() as memory:
    quantmill.convert(source, output, method, **options)
print(memory.bytes)
"""


def test_a_conversion_takes_no_more_memory_for_more_shards(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    above = {}
    few = tmp_path / "from-4"
    for layers, folder in folders.items():
        source = tmp_path / f"from-{layers}"
        quantmill.quantize(folder, source, "bnb-nf4", max_shard_bytes=8 * MIB)
        assert len(list(source.glob("*.safetensors"))) > layers // 3
        words = [str(few), str(source), str(tmp_path / f"to-{layers}"), "bnb-fp4"]
        command = [sys.executable, "-c", CONVERT, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=MAPPED)
        above[layers] = int(done.stdout.splitlines()[-1])
    # Twelve layers more are 168 MiB of floats and 48 MiB of NF4.
    assert above[16] <= above[4] + 8 * MIB, above
