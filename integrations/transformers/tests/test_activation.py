"""One line, and ``from_pretrained`` goes through quantmill: for what was listed, and no more."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantmill
import quantmill_transformers
from quantmill.findings import QuantmillError
from quantmill_transformers import activate, activated, active, deactivate
from quantmill_transformers.activation import SYMBOL, TRANSFORMERS_RANGE

Small = Callable[[str], Path]
bnb = pytest.importorskip("quantmill_bnb")
THERE = PreTrainedModel.__dict__["from_pretrained"]


@pytest.fixture(autouse=True)
def _nothing_is_left_active() -> Iterator[None]:
    assert PreTrainedModel.__dict__["from_pretrained"] is THERE
    yield
    deactivate()
    assert PreTrainedModel.__dict__["from_pretrained"] is THERE


def codes(caught: pytest.ExceptionInfo[QuantmillError]) -> set[str]:
    return {item.code for item in caught.value.findings}


def ours(model: Any) -> bool:
    return hasattr(model, "quantmill_job")


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory, small: Small) -> Path:
    """A stored checkpoint that transformers reads too."""
    folder = tmp_path_factory.mktemp("nf4") / "llama"
    quantmill.quantize(small("llama"), folder, "bnb-nf4")
    return folder


def test_what_is_listed_is_taken_over_and_given_back(nf4: Path) -> None:
    made = activate("bitsandbytes")
    assert made.quant_methods == ("bitsandbytes",) and SYMBOL in made.symbols
    assert "bitsandbytes" in str(made) and made == active()
    assert ours(AutoModelForCausalLM.from_pretrained(nf4))
    deactivate()
    assert active() is None
    assert not ours(AutoModelForCausalLM.from_pretrained(nf4))
    deactivate()  # Nothing is active: nothing happens.


def test_what_is_not_listed_stays_with_transformers(nf4: Path, small: Small) -> None:
    activate("gptq")
    theirs = AutoModelForCausalLM.from_pretrained(nf4)
    asked = transformers.BitsAndBytesConfig(load_in_4bit=True)
    on_the_fly = AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config=asked)
    float_model = AutoModelForCausalLM.from_pretrained(small("llama"))
    assert not any(map(ours, (theirs, on_the_fly, float_model)))
    # No other library can read these.
    for method in ("bnb-nf4", {"method": "bnb-nf4"}):
        assert ours(
            AutoModelForCausalLM.from_pretrained(small("llama"), quantization_config=method)
        )


def test_without_a_list_only_what_transformers_lacks_is_added(nf4: Path) -> None:
    made = activate()
    assert made.quant_methods == () and "quantmill" in made.added
    assert not ours(AutoModelForCausalLM.from_pretrained(nf4))


def test_a_second_call_adds_and_the_same_call_changes_nothing(nf4: Path) -> None:
    first = activate("gptq")
    there = PreTrainedModel.__dict__["from_pretrained"]
    second = activate("bitsandbytes")
    assert {*first.quant_methods, "bitsandbytes"} == set(second.quant_methods)
    assert activate("bitsandbytes") == second == active()
    assert PreTrainedModel.__dict__["from_pretrained"] is there, "nothing is wrapped twice"
    assert ours(AutoModelForCausalLM.from_pretrained(nf4))
    deactivate()
    assert PreTrainedModel.__dict__["from_pretrained"] is THERE


def test_a_block_leaves_things_as_they_were(nf4: Path) -> None:
    with activated("bitsandbytes"):
        assert ours(AutoModelForCausalLM.from_pretrained(nf4))
    assert active() is None
    outer = activate("gptq")
    with pytest.raises(ZeroDivisionError), activated("bitsandbytes"):
        1 / 0  # noqa: B018
    assert active() == outer
    with activated("bitsandbytes"):
        deactivate()
    assert active() is None


def test_names_may_be_methods_short_names_or_all() -> None:
    for name in ("bitsandbytes", "bnb", "bnb-nf4-dq"):
        with activated(name) as made:
            assert made.quant_methods == ("bitsandbytes",)
    with activated("*") as made:
        assert "bitsandbytes" in made.quant_methods


def test_an_unknown_name_is_refused_with_what_could_be_meant() -> None:
    with pytest.raises(QuantmillError) as caught:
        activate("bitsandbites", "nonsense")
    assert codes(caught) == {"QM-TAKE-001"} and len(caught.value.findings) == 2
    assert "bitsandbytes" in caught.value.findings[0].fix
    assert active() is None


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0", ""])
def test_a_version_outside_the_range_is_refused_with_advice(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def there(name: str) -> str:
        if not version:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", there)
    with pytest.raises(QuantmillError) as caught:
        activate("bitsandbytes")
    (finding,) = caught.value.findings
    assert finding.code == "QM-TAKE-002" and TRANSFORMERS_RANGE in finding.fix
    assert version in finding.cause and "quantmill.load" in finding.fix


def test_someone_else_on_top_is_not_thrown_away(nf4: Path) -> None:
    activate("bitsandbytes")
    mine = PreTrainedModel.__dict__["from_pretrained"]
    other = classmethod(lambda cls, *args, **kwargs: mine.__func__(cls, *args, **kwargs))
    PreTrainedModel.from_pretrained = other
    try:
        assert ours(AutoModelForCausalLM.from_pretrained(nf4))
        with pytest.raises(QuantmillError) as caught:
            deactivate()
        assert codes(caught) == {"QM-TAKE-003"}
        assert PreTrainedModel.__dict__["from_pretrained"] is other
        assert not ours(AutoModelForCausalLM.from_pretrained(nf4)), "calls pass through"
    finally:
        PreTrainedModel.from_pretrained = THERE


def test_activating_imports_no_vendor_library() -> None:
    code = (
        "import sys, quantmill_transformers as q; q.activate();"
        "print({'bitsandbytes', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout


def test_several_methods_in_one_checkpoint_load_by_from_pretrained(
    small: Small, tmp_path: Path
) -> None:
    mixed = {"method": "bnb-nf4", "assign": {"role:mlp": "bnb-int8"}}
    quantmill.quantize(small("llama"), tmp_path / "mixed", mixed)
    stored = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "quantmill"
    activate()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    kinds = {type(part).__name__ for part in model.modules() if hasattr(part, "exact_form")}
    assert kinds == {"QuantmillLinear4bit", "QuantmillLinear8bit"}


def test_a_folder_without_a_config_is_recognised(small: Small, tmp_path: Path) -> None:
    """Quanto's own files say it elsewhere: transformers would take codes for weights."""
    pytest.importorskip("quantmill_quanto")
    quantmill.quantize(small("llama"), tmp_path / "out", "quanto-int8")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert (tmp_path / "out" / "quanto_qmap.json").exists()
    activate("quanto")
    assert ours(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert not ours(AutoModelForCausalLM.from_pretrained(small("llama")))


def test_a_quant_method_that_nobody_reads_is_an_error(nf4: Path, tmp_path: Path) -> None:
    """Transformers warns and loads codes as if they were weights."""
    strange = tmp_path / "strange"
    strange.mkdir()
    for path in nf4.iterdir():
        (strange / path.name).symlink_to(path)
    config = json.loads((nf4 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "never-heard-of"}
    (strange / "config.json").unlink()
    (strange / "config.json").write_text(json.dumps(config))
    activate()
    with pytest.raises(QuantmillError) as caught:
        AutoModelForCausalLM.from_pretrained(strange)
    assert codes(caught) == {"QM-CONFIG-010"}
    assert "never-heard-of" in caught.value.findings[0].fix


def test_a_contradiction_is_an_error_with_the_difference(nf4: Path) -> None:
    activate("bitsandbytes")
    for asked in ("bnb-int8", transformers.BitsAndBytesConfig(load_in_8bit=True)):
        with pytest.raises(QuantmillError) as caught:
            AutoModelForCausalLM.from_pretrained(nf4, quantization_config=asked)
        assert codes(caught) == {"QM-CONFIG-011"}
        causes = {item.where: item.cause for item in caught.value.findings}
        assert "False" in causes["load_in_8bit"] and "True" in causes["load_in_8bit"]
    compute = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(nf4, quantization_config=compute)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_a_model_outlives_its_activation(nf4: Path, tmp_path: Path) -> None:
    with activated("bitsandbytes"):
        model = AutoModelForCausalLM.from_pretrained(nf4)
    model.save_pretrained(tmp_path / "saved")
    assert type(model.dequantize().model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_the_public_names_are_there() -> None:
    assert set(quantmill_transformers.__all__) == {
        "Activation",
        "activate",
        "activated",
        "active",
        "deactivate",
    }
