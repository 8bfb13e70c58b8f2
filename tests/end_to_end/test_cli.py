"""Every command as a user runs it, on a real small model with every plugin installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantmill.cli import main
from quantmill.testing import write_tiny_llama

NOVELLA = Path(__file__).resolve().parents[2] / "models" / "novella"
HELD = NOVELLA / "held.txt"
CALL = [sys.executable, "-c", "from quantmill.cli import main; main()"]
Cli = Callable[..., tuple[int, str, str]]


def shell(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CALL, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(item) for item in arguments])
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int) and "Traceback" not in captured.err
        return stopped.value.code, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """novella in NF4, written by the command in a shell."""
    out = tmp_path_factory.mktemp("cli") / "novella-nf4"
    done = shell("quantize", NOVELLA, out, "bnb-nf4", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    report = json.loads(done.stdout)
    assert Path(report["folder"]) == out and report["plan"]["totals"]["quantized"] == 56
    assert report["files"] == {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return out


# -- plan --------------------------------------------------------------------------------------


def test_plan_in_a_shell() -> None:
    done = shell("plan", NOVELLA, "bnb-nf4")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    row = next(line for line in done.stdout.splitlines() if ".mlp.up_proj" in line)
    assert row.split()[:2] == ["model.layers.*.mlp.up_proj", "8"]
    assert "56 quantized, 1 kept. 15.51 MiB -> 5.81 MiB on disk" in done.stdout


def test_plan_as_json(cli: Cli) -> None:
    code, out, err = cli("plan", NOVELLA, "bnb-nf4:bnb_4bit_blocksize=128", "--json")
    plan = json.loads(out)
    assert code == 0 and err == "" and plan["findings"] == []
    assert "blocks of 128" in str(plan["methods"])
    module = next(m for m in plan["modules"] if m["name"] == "model.layers.7.mlp.down_proj")
    assert module["action"] == "quantize" and module["shape"] == [256, 896]
    codes, scales = 256 * 896 // 2, 4 * 256 * 896 // 128
    assert codes + scales < module["bytes_after"] < codes + scales + 256


def test_plan_every_module(cli: Cli) -> None:
    _, out, _ = cli("plan", NOVELLA, "bnb-nf4", "--all")
    assert all(f"model.layers.{layer}.mlp.up_proj " in out for layer in range(8))


def test_plan_with_patterns(cli: Cli) -> None:
    code, out, _ = cli(
        "plan", NOVELLA, "bnb-int8", "--skip", "layers:0,-1", "--include", "layers:-1 & role:mlp",
        "--json",
    )  # fmt: skip
    actions = {item["name"]: item["action"] for item in json.loads(out)["modules"]}
    assert code == 0
    assert actions["model.layers.0.mlp.up_proj"] == "keep"
    assert actions["model.layers.7.mlp.up_proj"] == "quantize"
    assert actions["model.layers.7.self_attn.q_proj"] == "keep"
    assert actions["model.layers.3.self_attn.q_proj"] == "quantize"


@pytest.mark.parametrize(("memory", "fits"), [("1GiB", True), ("16MiB", False)])
def test_plan_what_fits(cli: Cli, memory: str, fits: bool) -> None:
    code, out, _ = cli("plan", NOVELLA, "--memory", memory, "--json")
    data = json.loads(out)
    assert code == (0 if fits else 1)
    assert {item["fits"] for item in data["candidates"]} == {fits}
    loss = [item["loss_bits"] for item in data["candidates"]]
    assert loss == sorted(loss), "what loses least comes first"
    code, out, _ = cli("plan", NOVELLA, "--memory", memory)
    assert code == (0 if fits else 1) and "bnb-nf4-dq" in out


def test_a_longer_context_needs_more_memory(cli: Cli) -> None:
    peaks = []
    for context in (1, 10_000):
        _, out, _ = cli("plan", NOVELLA, "--memory", "1GiB", "--context", context, "--json")
        peaks.append(json.loads(out)["candidates"][0]["needs"]["cache"])
    # Two tensors of 2 heads of 64 in 16 bits for each of 8 layers.
    assert peaks[1] - peaks[0] == 9_999 * 2 * 8 * 2 * 64 * 2


@pytest.mark.parametrize(
    "method",
    [
        "nf5",
        "bnb-nf4:foo",
        "bnb-nf4:nonsense=1",
        "{bad json",
        '{"skip": 3}',
        '{"load_in_4bit": true, "load_in_8bit": true}',
        '{"method": "bnb-nf4", "assign": {"role:mlp": "nope"}}',
        "no-such-file.json",
        "no-such-file.yaml",
    ],
)
def test_a_method_that_can_not_be_read(cli: Cli, method: str) -> None:
    code, out, err = cli("plan", NOVELLA, method)
    assert code == 1 and out == "" and "fix:" in err
    code, out, err = cli("plan", NOVELLA, method, "--json")
    assert code == 1 and err == "" and json.loads(out)["findings"][0]["fix"]


# -- quantize ----------------------------------------------------------------------------------


def test_quantize_says_what_it_wrote(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("quantize", NOVELLA, tmp_path / "out", "bnb-int8", "--quiet")
    assert code == 0
    assert out.startswith("wrote ") and "56 modules quantized, 8." in out


def test_small_shards(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, _ = cli("quantize", NOVELLA, out, "bnb-nf4", "--max-shard", "2.5MB")
    # The size is that of the tensors; a header comes on top.
    sizes = [
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for path in out.glob("*.safetensors")
    ]
    assert code == 0 and len(sizes) == 3 and max(sizes) <= 2_500_000


def test_strict_makes_a_fallback_an_error(cli: Cli, tmp_path: Path) -> None:
    weight = torch.randn(128, 64).to(torch.bfloat16)
    weight[3, 4] = float("inf")
    name = "model.layers.0.mlp.up_proj.weight"
    folder = write_tiny_llama(tmp_path / "model", change={name: weight})
    arguments = ["quantize", folder, tmp_path / "out", "bnb-nf4", "--non-finite", "keep"]
    code, out, err = cli(*arguments, "--strict", "--json")
    assert code == 1 and err == "" and not (tmp_path / "out").exists()
    assert json.loads(out)["findings"][0]["code"] == "QM-WEIGHT-002"
    code, _, err = cli(*arguments)
    assert code == 0 and "warning QM-WEIGHT-002" in err and (tmp_path / "out").is_dir()


def test_a_calibrated_method(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("quantmill_gptq")
    arguments = ["quantize", write_tiny_llama(tmp_path / "model"), tmp_path / "out", "gptq-4"]
    code, out, err = cli(*arguments, "--json")
    assert code == 1 and err == "" and "--calibration" in json.loads(out)["findings"][0]["fix"]
    tokens = tmp_path / "tokens.jsonl"
    lines = [{"input_ids": [(7 * row + column) % 256 for column in range(32)]} for row in range(8)]
    tokens.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments += [
        "--calibration",
        tokens,
        "--calibration-samples",
        "4",
        "--calibration-length",
        "32",
    ]
    code, out, err = cli(*arguments, "--json")
    assert code == 0, out + err
    assert json.loads(out)["plan"]["totals"]["quantized"] == 14


# -- inspect, kernels, schema, doctor, plugins -------------------------------------------------


def test_inspect(cli: Cli, nf4: Path) -> None:
    code, out, err = cli("inspect", nf4)
    assert code == 0 and err == ""
    assert "bnb_4bit_quant_type" in out and "codebook nf4 4-bit, flat 64" in out
    data = json.loads(cli("inspect", nf4, "--json")[1])
    quantized = [item for item in data["modules"] if item["method"]]
    assert len(quantized) == 56 and data["quantization"]["quant_method"] == "bitsandbytes"
    assert data["totals"]["bytes"] == sum(data["totals"]["bytes_by_dtype"].values())


def test_kernels_explain(cli: Cli, nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.self_attn.q_proj"
    code, out, _ = cli("kernels", "--explain", NOVELLA, "bnb-nf4-dq", name, "--json")
    data = json.loads(out)
    chosen = {(item["operation"], item["of"]): item["kernel"] for item in data["operations"]}
    assert code == 0 and data["linear"] == "quantmill_bnb.linear:BnbLinearFactory"
    assert chosen["quantize", "weight"] == "cpu-quantize-codebook4"
    assert chosen["quantize", "weight.scale"] == "cpu-quantize-codebook8"
    assert chosen["dequantize", "weight"] == "cpu-dequantize-codebook"
    monkeypatch.setenv("QUANTMILL_DISABLE_KERNELS", "cpu-dequantize-codebook")
    code, out, _ = cli("kernels", "--explain", nf4, name)
    assert code == 0 and "none: the form's plain torch reference" in out


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb", "bitsandbytes"])
def test_schema(cli: Cli, name: str) -> None:
    code, out, err = cli("schema", name)
    assert code == 0 and err == ""
    assert json.loads(out)["properties"]["bnb_4bit_blocksize"]["default"] == 64


def test_doctor(cli: Cli) -> None:
    code, out, _ = cli("doctor", "--check", "--json")
    data = json.loads(out)
    assert code == 0, "everything is installed here"
    assert {item["name"] for item in data["methods"]} >= {"bnb"}
    code, out, _ = cli("doctor")
    assert code == 0 and "bnb-nf4-dq" in out and "free memory" in out


def test_plugins_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    done = shell("plugins", "--strict", "--json")
    found = {item["name"]: item for item in json.loads(done.stdout)["plugins"]}
    assert done.returncode == 0 and found.keys() >= {"bnb", "cpu", "transformers"}
    monkeypatch.setenv("QUANTMILL_DISABLE", "bnb")
    done = shell("plugins", "--strict")
    assert done.returncode == 0, "what a user disables is no defect"
    assert "on the disable list" in done.stdout


# -- eval and generate -------------------------------------------------------------------------


def test_eval_against_a_reference(cli: Cli, nf4: Path, private_cache: Path) -> None:
    arguments = ["eval", nf4, "--text", HELD, "--reference", NOVELLA]
    arguments += ["--context", "64", "--max-windows", "3"]
    code, out, err = cli(*arguments, "--json")
    first = json.loads(out)
    assert code == 0 and err == ""
    assert 0.005 < first["kl_mean"] < 0.05 and 0.85 < first["top1_agreement"] < 0.97
    assert first["context"] == 64 and first["tokens"] == 3 * 63
    (stored,) = private_cache.rglob("*.qmref")
    written = stored.stat().st_mtime_ns
    code, out, _ = cli(*arguments)
    assert code == 0 and "perplexity" in out and "kl_mean" in out
    assert stored.stat().st_mtime_ns == written, "the reference was computed once"
    damaged = bytearray(stored.read_bytes())
    damaged[-100] ^= 255
    stored.write_bytes(damaged)
    code, out, err = cli(*arguments, "--json")
    again = json.loads(out)
    assert code == 0 and "QM-EVAL-010" in err, "a damaged entry is noticed and replaced"
    assert again["kl_mean"] == pytest.approx(first["kl_mean"], rel=1e-6)


@pytest.mark.parametrize("protocol", ["blocks", "sliding", "llama.cpp"])
def test_eval_protocols(cli: Cli, protocol: str) -> None:
    code, out, _ = cli(
        "eval", NOVELLA, "--text", HELD, "--protocol", protocol, "--context", "64",
        "--max-windows", "3", "--json",
    )  # fmt: skip
    data = json.loads(out)
    scored = {"blocks": 3 * 63, "sliding": 63 + 2 * 32, "llama.cpp": 3 * 31}
    assert code == 0 and data["protocol"] == protocol and data["tokens"] == scored[protocol]
    assert 10 < data["perplexity"] < 300 and data["kl_mean"] is None


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--context", "513"], "QM-EVAL-032"),
        (["--context", "100000"], "QM-EVAL-003"),
        (["--context", "2", "--protocol", "llama.cpp"], "QM-EVAL-002"),
    ],
)
def test_eval_that_can_not_be(cli: Cli, options: list[str], code: str) -> None:
    exit_code, out, err = cli("eval", NOVELLA, "--text", HELD, *options, "--json")
    assert exit_code == 1 and err == ""
    assert [item["code"] for item in json.loads(out)["findings"]] == [code]


def test_generate(cli: Cli, nf4: Path) -> None:
    arguments = ["--prompt", "It was a dark night", "--max-new-tokens", "6"]
    code, out, err = cli("generate", NOVELLA, "bnb-nf4", *arguments)
    assert code == 0 and out.startswith("It was a dark night") and "6 tokens in" in err
    code, again, _ = cli("generate", nf4, *arguments, "--json")
    data = json.loads(again)
    assert code == 0 and data["new_tokens"] == 6
    assert data["text"] == out.removesuffix("\n"), "stored and on the fly are the same model"


def test_generate_samples_by_its_seed(cli: Cli) -> None:
    texts = []
    for seed in (1, 1, 2):
        _, out, _ = cli(
            "generate", NOVELLA, "--prompt", "The", "--max-new-tokens", "12",
            "--temperature", "1.5", "--seed", seed, "--json",
        )  # fmt: skip
        texts.append(json.loads(out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt(cli: Cli) -> None:
    code, out, err = cli("generate", NOVELLA, "--prompt", "")
    assert code == 2 and out == "" and "gives no tokens" in err


# -- pipes and interrupts ----------------------------------------------------------------------


def test_head_of_a_long_table(nf4: Path) -> None:
    process = subprocess.Popen(
        [*CALL, "inspect", str(nf4), "--tensors"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "quantization_config\n"
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and errors == ""


def test_a_traceback_only_when_asked(tmp_path: Path) -> None:
    plain = shell("plan", tmp_path, "bnb-nf4")
    assert plain.returncode == 1 and "Traceback" not in plain.stderr
    debug = shell("--debug", "plan", tmp_path, "bnb-nf4", "--json")
    assert debug.returncode == 1 and "Traceback" in debug.stderr
    assert json.loads(debug.stdout)["error"] is True
