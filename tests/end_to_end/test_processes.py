"""Calibration under ``torchrun``: two processes, the bytes of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quantmill
from quantmill.calibration.carry_out import resume_folder
from quantmill.processes import Processes
from quantmill.testing import write_tiny_llama

ORDERED = "gptq-4:group_size=32,sym=false,desc_act=true"
AWQ = "awq-4:group_size=32"
TOGETHER = "gptq-4:group_size=16,true_sequential=false"


def plain_model() -> nn.Sequential:
    """Blocks without a framework, the same each time."""
    torch.manual_seed(0)
    blocks = [[nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)] for _ in range(3)]
    return nn.Sequential(*(nn.Sequential(*parts) for parts in blocks))


def calls() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator) for _ in range(5)]


SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from safetensors.torch import save_file
import quantmill
import test_processes as shared

source, tokens, work = (Path(argument) for argument in sys.argv[2:5])
rank = os.environ["RANK"]
quantmill.quantize(source, work / "awq", shared.AWQ, calibration=tokens)
assert (work / "awq" / "config.json").exists()
model = quantmill.load(source, shared.TOGETHER, calibration=tokens)
save_file(model.state_dict(), work / f"loaded-{rank}.safetensors")
plain = quantmill.quantize_model(
    shared.plain_model(), shared.TOGETHER, calibration=shared.calls()
)
save_file(plain.state_dict(), work / f"plain-{rank}.safetensors")

def killed(done, total, what):
    if done == 2:
        os._exit(9)

quantmill.quantize(source, work / "out", shared.ORDERED, calibration=tokens, progress=killed)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("processes")
    return write_tiny_llama(where / "float", hidden=96, inner=160, layers=3, heads=4)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Path:
    # Three batches: the processes have an unequal share.
    ids = torch.randint(0, 24, (24, 512), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, folder.parent / "tokens.safetensors")
    return folder.parent / "tokens.safetensors"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # a busy machine takes its time
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # what torchrun sets
    )


def assert_same_files(one: Path, two: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def assert_same_tensors(state: dict[str, torch.Tensor], path: Path) -> None:
    stored = load_file(path)
    assert set(stored) == set(state)
    for name, tensor in state.items():
        assert torch.equal(stored[name], tensor), (path.name, name)


def test_the_same_command_gives_the_same_bytes(folder: Path, tokens: Path, tmp_path: Path) -> None:
    command = ("-m", "quantmill", "quantize", folder, tmp_path / "two", ORDERED)
    done = run(*command, "--calibration", tokens)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1  # the first process speaks
    quantmill.quantize(folder, tmp_path / "one", ORDERED, calibration=tokens)
    assert_same_files(tmp_path / "one", tmp_path / "two")


LEAVING = """
import atexit
from torch import distributed
atexit.register(lambda: print("still joined" if distributed.is_initialized() else "left"))
from quantmill.processes import Processes
Processes.from_environment().wait()
"""


def test_a_process_ends_the_groups_threads_before_it_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LEAVING, encoding="utf-8")
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left") == 2


def test_every_call_shares_its_work_and_one_process_goes_on_after_two(
    folder: Path, tokens: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = run(script, Path(__file__).parent, folder, tokens, tmp_path)
    out = tmp_path / "out"
    assert done.returncode != 0
    assert not out.exists() and len(list(resume_folder(out).glob("block-*"))) == 2, done.stderr

    quantmill.quantize(folder, tmp_path / "one", AWQ, calibration=tokens)
    assert_same_files(tmp_path / "one", tmp_path / "awq")
    loaded = quantmill.load(folder, TOGETHER, calibration=tokens).state_dict()
    plain = quantmill.quantize_model(plain_model(), TOGETHER, calibration=calls()).state_dict()
    for rank in range(2):
        assert_same_tensors(loaded, tmp_path / f"loaded-{rank}.safetensors")
        assert_same_tensors(plain, tmp_path / f"plain-{rank}.safetensors")

    seen: list[str] = []
    quantmill.quantize(
        folder, out, ORDERED, calibration=tokens, progress=lambda d, t, what: seen.append(what)
    )
    assert not any("layers.0" in what or "layers.1" in what for what in seen)
    quantmill.quantize(folder, tmp_path / "ordered", ORDERED, calibration=tokens)
    assert_same_files(tmp_path / "ordered", out)


def test_what_the_float_model_gives_is_shared_too(
    folder: Path, tokens: Path, tmp_path: Path
) -> None:
    method = "gptq-3:group_size=32,gptaq_alpha=0.5"
    done = run(
        "-m", "quantmill", "quantize", folder, tmp_path / "two", method, "--calibration", tokens
    )
    assert done.returncode == 0, done.stderr
    quantmill.quantize(folder, tmp_path / "one", method, calibration=tokens)
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes.from_environment()
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    assert alone.agree(lambda: {"a": [1]}) == {"a": [1]}
    assert alone.gather([1, 2]) == [[1, 2]]
