"""Mixed precision under a budget: sensitivities, the allocation, checkpoints that say it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quantmill
from quantmill.checkpoint import containers
from quantmill.cli import main
from quantmill.findings import QuantmillError
from quantmill.testing import write_tiny_llama

for _package in ("bnb", "gguf", "gptq", "hqq", "compressed_tensors", "transformers"):
    pytest.importorskip(f"quantmill_{_package}")

GPTQ = ["gptq-2:group_size=32", "gptq-4:group_size=32", "gptq-8:group_size=32"]
SEARCH: dict[str, Any] = {"samples": 8, "length": 32, "search_samples": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The last layer writes much, the first one hardly anything.
    loud = {
        f"model.layers.{layer}.mlp.down_proj.weight": (
            torch.randn(64, 128, generator=torch.Generator().manual_seed(layer)) * size
        ).to(torch.bfloat16)
        for layer, size in ((0, 0.002), (1, 0.3))
    }
    return write_tiny_llama(tmp_path_factory.mktemp("budget") / "float", change=loud)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def report(tiny: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("mixture") / "gptq"
    return quantmill.quantize_to_budget(
        tiny, output, "5.5bpw", GPTQ, calibration=tokens, measure=42, **SEARCH
    )


def test_the_mixture_keeps_to_the_budget_and_beats_what_it_is_made_of(report: Any) -> None:
    assert 5.2 < report.bits <= 5.5
    plan = quantmill.plan(report.written.folder)
    assert plan.totals["bits_per_weight"] == pytest.approx(report.bits)
    chosen = report.chosen
    assert "gptq-2" not in chosen["model.layers.1.mlp.down_proj"]
    assert "gptq-2" in chosen["model.layers.0.mlp.down_proj"]
    costs = sorted(report.uniform.values())
    assert costs[0][1] > report.estimated > costs[-1][1]
    assert costs[1][0] < report.bits and report.estimated < costs[1][1] / 2


def test_the_estimate_follows_the_measurement(report: Any) -> None:
    assert len(report.measured) == 42
    assert report.correlation > 0.97
    large = [(a, b) for _, _, a, b in report.measured if b > 1e-4]
    assert len(large) > 5
    assert all(0.2 < a / b < 5 for a, b in large)


def test_gptq_says_it_in_its_own_config(report: Any) -> None:
    folder = report.written.folder
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == "gptq_v2"
    bits = {json.dumps(item, sort_keys=True) for item in config["dynamic"].values()}
    assert len(bits) >= 1
    model = quantmill.load(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None]).logits
    assert bool(torch.isfinite(logits).all())
    assert quantmill.verify(folder).sound


def test_the_mixture_is_made_more_thoroughly_than_the_search(report: Any) -> None:
    methods = {report.method["method"], *report.method["assign"].values()}
    assert all("gptaq_alpha=0.75" in label for label in methods)
    assert not any("gptaq" in label for label in report.chosen.values())


def test_what_is_set_stays_so(tiny: Path, tokens: Path, tmp_path: Path) -> None:
    methods = ["gptq-2:group_size=32,gptaq_alpha=0", "gptq-4:group_size=32,gptaq_alpha=0"]
    made = quantmill.quantize_to_budget(
        tiny, tmp_path / "out", 4, methods, calibration=tokens, measure=0, **SEARCH
    )
    labels = {made.method["method"], *made.method["assign"].values()}
    assert len(labels) == 2
    assert all("gptaq_alpha=0," in label and "refinements=4" in label for label in labels)


def test_nothing_is_left_beside_the_output(report: Any) -> None:
    folder = report.written.folder
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]


def test_different_methods_make_a_table(
    tiny: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = [], containers.open_checkpoint

    def counted(source: Any, host: Any) -> Any:
        read.append(source)
        return real(source, host)

    monkeypatch.setattr(containers, "open_checkpoint", counted)
    made = quantmill.quantize_to_budget(
        tiny, tmp_path / "out", 6.5, ["bnb-nf4", "hqq-8"], calibration=tokens, measure=0, **SEARCH
    )
    assert read.count(tiny) == 1, "a Hub's headers cost requests"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quantmill" and len(made.counts) == 2
    assert made.correlation is None and made.measured == []
    model = quantmill.load(tmp_path / "out")
    kinds = {
        type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__
    }
    assert len(kinds) >= 2


def test_compressed_tensors_has_a_group_for_each(tiny: Path, tokens: Path, tmp_path: Path) -> None:
    methods = ["ct-int4:group_size=32", "ct-int4:group_size=32,num_bits=8"]
    quantmill.quantize_to_budget(
        tiny, tmp_path / "out", 6.5, methods, calibration=tokens, measure=0, **SEARCH
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    widths = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    assert config["quant_method"] == "compressed-tensors" and widths == {4, 8}


def test_gguf_has_a_type_for_each_tensor(tmp_path: Path, tokens: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "float")
    methods = ["gguf-q4_0", "gguf-q8_0"]
    made = quantmill.quantize_to_budget(
        tiny, tmp_path / "out.gguf", 6.5, methods, calibration=tokens, measure=0, **SEARCH
    )
    plan = quantmill.plan(tmp_path / "out.gguf")
    forms = {item.form for item in plan.modules if item.action == "quantize"}
    assert len(forms) >= 2 and made.bits <= 6.5


def test_experts_in_one_tensor_have_one_type(tmp_path: Path) -> None:
    zoo = pytest.importorskip("quantmill_transformers.testing")
    mixture = zoo.write("mixtral", tmp_path / "float")
    ids = torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(0))
    methods = ["gguf-q4_0", "gguf-q8_0"]
    made = quantmill.quantize_to_budget(
        mixture, tmp_path / "out.gguf", 6.5, methods, calibration=ids, measure=0, **SEARCH
    )
    assert made.bits <= 6.5 and len(made.counts) == 2
    types: dict[str, set[str]] = {}
    for name, method in made.chosen.items():
        if ".experts." in name:
            types.setdefault(re.sub(r"experts\.\d+", "experts", name), set()).add(method)
    assert len(types) == 6 and all(len(item) == 1 for item in types.values())


def test_the_head_may_be_among_the_targets(tiny: Path, tokens: Path, tmp_path: Path) -> None:
    made = quantmill.quantize_to_budget(
        tiny,
        tmp_path / "out",
        6.5,
        ["hqq-4", "hqq-8"],
        calibration=tokens,
        measure=0,
        include=["lm_head"],
        **SEARCH,
    )
    assert made.chosen.keys() >= {"lm_head", "model.layers.0.mlp.up_proj"}
    forms = {item.name: item.form for item in quantmill.plan(tmp_path / "out").modules}
    width = made.chosen["lm_head"].removeprefix("hqq-")
    assert f"{width}-bit" in forms["lm_head"]


def test_what_nothing_can_meet_names_the_least(
    tiny: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(QuantmillError) as caught:
        quantmill.quantize_to_budget(tiny, tmp_path / "out", 1.0, GPTQ, calibration=tokens)
    (finding,) = caught.value.findings
    least = quantmill.plan(tiny, GPTQ[0]).totals["bits_per_weight"]
    assert finding.code == "QM-BUDGET-002"
    assert f"the least is {least:.4f} bits per weight" in finding.cause
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("budget", "methods", "code"),
    [
        ("many", GPTQ, "QM-BUDGET-001"),
        ("-3bpw", GPTQ, "QM-BUDGET-001"),
        ("nan", GPTQ, "QM-BUDGET-001"),
        (4.25, GPTQ[:1], "QM-BUDGET-003"),
        (4.25, [], "QM-BUDGET-003"),
        (4.25, ["gptq-4", "gptq-44"], "QM-SELECT-001"),
        (4.25, ["gguf-q4_0", "gptq-4"], "QM-METHOD-001"),
    ],
)
def test_bad_input(
    tiny: Path, tokens: Path, tmp_path: Path, budget: Any, methods: list[str], code: str
) -> None:
    with pytest.raises(QuantmillError) as caught:
        quantmill.quantize_to_budget(tiny, tmp_path / "out", budget, methods, calibration=tokens)
    assert code in {item.code for item in caught.value.findings}
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_refused_first(tiny: Path, tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(QuantmillError, match="QM-CKPT-050"):
        quantmill.quantize_to_budget(tiny, tmp_path / "out", 4.0, GPTQ, calibration=tokens)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_the_command(
    tiny: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, "quantize", tiny, out)[0] == 2
    assert run(capsys, "quantize", tiny, out, "--budget", "4")[0] == 2
    assert (
        run(capsys, "quantize", tiny, out, "bnb-nf4", "--budget", "4", "--methods", "a,b")[0] == 2
    )
    few = ["--calibration", tokens, "--calibration-length", 32, "--calibration-samples", 4]
    code, text, err = run(
        capsys,
        "quantize",
        tiny,
        out,
        "--budget",
        "6bpw",
        "--methods",
        "bnb-nf4,bnb-int8",
        *few,
        "--json",
    )
    assert code == 0, err
    data = json.loads(text)
    assert data["bits_per_weight"] <= 6 and data["written"] and data["correlation"] > 0.9
    assert sum(data["counts"].values()) == 14
    code, _, err = run(
        capsys, "quantize", tiny, tmp_path / "b", "--budget", "6", "--methods", "bnb-nf4,bnb-int8"
    )
    assert code == 1 and "--calibration FILE" in err
