"""Choosing a method for a memory: what fits and why not, exact bytes, and what it costs."""

from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantmill
from quantmill.api import make_job, prepare
from quantmill.cli import main
from quantmill.findings import QuantmillError
from quantmill.hookspecs import hookimpl
from quantmill.host import Host, default_host
from quantmill.judging import Judge
from quantmill.memory import Sizes, cache_bytes
from quantmill.testing import write_tiny_llama

for _package in ("bnb", "gptq", "hqq", "transformers"):
    pytest.importorskip(f"quantmill_{_package}")

NOVELLA = Path(__file__).resolve().parents[2] / "models" / "novella"
HELD, CALIB = NOVELLA / "held.txt", NOVELLA / "calib.txt"


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTMILL_CACHE", str(tmp_path / "cache"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_every_installed_method_is_a_candidate_with_the_bytes_of_its_plan() -> None:
    found = quantmill.choose(NOVELLA, 1 << 30)
    names = {item.candidate.name for item in found.candidates}
    assert names >= {*default_host().presets, "float"}
    for item in found.candidates:
        assert item.candidate.bits_per_weight > 0 or not item.candidate.fits, item.candidate.name
        if item.candidate.name in ("bnb-nf4", "gptq-4", "hqq-8"):
            totals = quantmill.plan(NOVELLA, item.candidate.name).totals
            assert item.candidate.fits and item.candidate.needs is not None
            assert item.candidate.bytes == totals["bytes_after"]
            assert item.candidate.needs.weights == totals["bytes_memory"]
            assert item.candidate.needs.loading == totals["peak_bytes"]
    assert found.best is not None and found.best.candidate.name == "float"


def test_what_does_not_fit_says_how_much_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "choose", NOVELLA, "--memory", "5MiB", "--methods", "bnb-nf4")
    assert code == 1 and "nothing fits" in err
    assert "QM-CHOOSE-010" in out and "5,242,880 are allowed" in out
    code, out, _ = run(
        capsys, "choose", NOVELLA, "--memory", "40MiB", "--methods", "float,bnb-nf4", "--json"
    )
    data = json.loads(out)
    assert code == 0 and data["best"] == "bnb-nf4"
    assert [item["fits"] for item in data["candidates"]] == [True, False]
    assert data["candidates"][1]["finding"]["code"] == "QM-CHOOSE-010"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--device", "cuda:9", "--methods", "hqq-4"], "QM-DEVICE-001"),
        (["--for", "train", "--methods", "ct-nvfp4", "--memory", "1MiB"], "QM-CHOOSE-010"),
    ],
)
def test_what_can_not_run_here_has_its_finding(
    capsys: pytest.CaptureFixture[str], options: list[str], code: str
) -> None:
    exit_code, out, _ = run(capsys, "choose", NOVELLA, "--memory", "1GiB", *options, "--json")
    (item,) = json.loads(out)["candidates"]
    assert exit_code == 1 and not item["fits"] and item["finding"]["code"] == code
    assert item["finding"]["fix"]


def test_plugins_and_methods_that_can_not_be_used_say_why() -> None:
    method = default_host().methods["hqq"]
    frozen = replace(
        method,
        name="frozen",
        aliases=(),
        quant_methods=("frozen",),
        capabilities=replace(method.capabilities, trainable=False),
        presets=tuple(replace(item, name=f"frozen-{item.name}") for item in method.presets),
    )
    plugin = types.ModuleType("frozen_plugin")
    vars(plugin).update(QUANTMILL_API=1, quantmill_methods=hookimpl(lambda: [frozen]))
    host = Host()
    assert str(host.add(plugin, "frozen").status) == "ok"
    old = types.ModuleType("old_plugin")
    vars(old).update(QUANTMILL_API=99)
    host.add(old, "from-tomorrow")
    found = quantmill.choose(NOVELLA, 1 << 34, use="train", host=host)
    rows = {item.candidate.name: item.candidate for item in found.candidates}
    refused = rows["frozen-hqq-4"].finding
    assert refused is not None and refused.code == "QM-CHOOSE-011" and "trainable" in refused.fix
    assert rows["hqq-4"].fits and rows["frozen-hqq-4"].needs is not None
    unusable = rows["(from-tomorrow)"].finding
    assert unusable is not None and unusable.code == "QM-CHOOSE-012"
    assert "wrong API version" in unusable.cause and "99" in unusable.cause
    infer = quantmill.choose(NOVELLA, 1 << 34, methods=["frozen-hqq-4"], host=host)
    assert infer.best is not None and infer.best.candidate.name == "frozen-hqq-4"


def test_training_counts_adapters_and_optimizer() -> None:
    def needs(**options: Any) -> Any:
        found = quantmill.choose(NOVELLA, 1 << 34, methods=["bnb-nf4"], **options)
        (item,) = found.candidates
        assert item.candidate.needs is not None
        return item.candidate.needs

    infer, train = needs(context=256), needs(use="train", context=256)
    # Query and output are square, keys and values half as many rows, three of the MLP.
    pairs = 8 * (2 * (256 + 256) + 2 * (128 + 256) + 3 * (896 + 256))
    assert infer.adapters == 0 and train.adapters == 16 * pairs * 16
    assert train.cache == 0 and infer.cache == 2 * 8 * 2 * 64 * 256 * 2
    assert needs(use="train", context=256, rank=32).adapters == 2 * train.adapters
    assert needs(use="train", context=512).working > 1.9 * train.working


def test_measured_candidates_are_ordered_by_what_they_lose(tmp_path: Path) -> None:
    methods = ["float", "bnb-nf4", "hqq-8", "gptq-3", "gptq-4"]
    found = quantmill.choose(NOVELLA, 1 << 30, text=HELD, methods=methods, max_windows=2, measure=4)
    rows = {item.candidate.name: item for item in found.candidates}
    assert [item.candidate.name for item in found.candidates[:3]] == ["float", "hqq-8", "bnb-nf4"]
    assert rows["float"].kl == pytest.approx(0.0, abs=1e-6)
    assert 0 < (rows["hqq-8"].kl or 0) < (rows["bnb-nf4"].kl or 0) / 5
    for name in ("gptq-3", "gptq-4"):
        finding = rows[name].finding
        assert rows[name].kl is None and finding is not None
        assert finding.code == "QM-CHOOSE-020" and "--calibration" in finding.fix
    assert found.tokens == 2 * 511 and found.to_dict()["best"] == "float"


def test_a_calibrated_candidate_is_measured_with_data(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(CALIB.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    found = quantmill.choose(
        NOVELLA, 1 << 30, text=HELD, methods=["gptq-3"], max_windows=1, calibration=text
    )
    (item,) = found.candidates
    assert item.kl is not None and 0.01 < item.kl < 1.0 and item.finding is None


@pytest.mark.parametrize("method", ["bnb-nf4", None])
def test_a_streamed_model_computes_what_a_loaded_one_does(method: str | None) -> None:
    judge = Judge(NOVELLA, HELD.read_text(encoding="utf-8"), max_windows=2, streaming=True)
    job = make_job(NOVELLA, method)
    prepare(job, allow_float=True)
    streamed = judge.judge_streaming(job)
    loaded = judge.judge(quantmill.load(NOVELLA, method))
    assert streamed.kl_mean == pytest.approx(loaded.kl_mean, rel=1e-4, abs=1e-7)
    assert streamed.nll == pytest.approx(loaded.nll, rel=1e-5)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(QuantmillError, match="did you mean bnb-nf4"):
        quantmill.choose(NOVELLA, 1 << 30, methods=["bnb-nf44"])
    tiny = write_tiny_llama(tmp_path / "tiny")
    quantmill.quantize(tiny, tmp_path / "nf4", "bnb-nf4")
    code, _, err = run(capsys, "choose", tmp_path / "nf4", "--memory", "1GiB")
    assert (code == 1 and "QM-CHOOSE-001" in err and "quantized already" in err) or "fix:" in err
    code, _, err = run(
        capsys, "choose", tiny, "--memory", "1GiB", "--text", HELD, "--methods", "bnb-nf4"
    )
    assert code == 1 and "tokenizer" in err
    assert run(capsys, "choose", tiny)[0] == 2, "--memory is required"


def test_caches_of_other_architectures() -> None:
    llama = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    assert cache_bytes(llama, 100) == 4 * 2 * 2 * 8 * 100 * 2
    assert cache_bytes({"text_config": llama}, 100) == cache_bytes(llama, 100)
    half = {
        **llama,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    assert cache_bytes(half, 100) == 2 * 2 * 2 * 8 * (100 + 10) * 2
    latent = {
        **llama,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    }
    assert Sizes.of(latent).cached == 8 * (8 + 4 + 6)
    assert Sizes.of({"n_embd": 32, "n_layer": 2, "n_head": 4}).inner == 128
