"""``quantmill kernels`` and why a kernel is chosen or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantmill.findings import QuantmillError
from quantmill.host import Host
from quantmill.kernels import KernelRegistry
from quantmill.registrations import Kernel, Requirement
from quantmill.testing import write_tiny_llama

Cli = Callable[..., Any]
TRAITS = {"bits": 4, "grouping": "flat"}


def absent() -> str | None:
    return "no such instruction"


def kernel(name: str, **options: Any) -> Kernel:
    given = {"operation": "matmul", "form": "codebook", "implementation": "a.b:c", **options}
    return Kernel(name=name, **given)


KERNELS = [
    kernel("best", cost=0.1),
    kernel("second", cost=0.2),
    kernel("other-form", form="affine", cost=0.01),
    kernel("other-operation", operation="quantize", cost=0.01),
    kernel("other-device", device="cuda", cost=0.01),
    kernel("other-dtype", dtypes=("float16",), cost=0.01),
    kernel("few-rows", max_rows=2, cost=0.01),
    kernel("other-bits", constraints={"bits": (8,)}, cost=0.01),
    kernel("lacking", requirements=(Requirement("no-such-library", ">=1"),), cost=0.01),
    kernel("unable", available=f"{__name__}:absent", cost=0.01),
]


def explain(registry: KernelRegistry, **options: Any) -> tuple[str | None, dict[str, str]]:
    chosen, reasons = registry.explain(
        "matmul", "codebook", TRAITS, device="cpu", dtype="bfloat16", **{"rows": 3, **options}
    )
    return None if chosen is None else chosen.name, reasons


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module under its own name, which import strings need."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _module())


def _module() -> Any:
    import types

    made = types.ModuleType(__name__)
    made.absent = absent  # type: ignore[attr-defined]
    return made


def test_the_cheapest_is_chosen_and_each_other_has_its_reason() -> None:
    chosen, reasons = explain(KernelRegistry(KERNELS))
    assert chosen == "best"
    assert reasons == {
        "second": "costs 0.2, not less than 0.1",
        "other-form": "is for the form affine",
        "other-device": "is for cuda",
        "other-dtype": "takes float16, not bfloat16",
        "few-rows": "is for at most 2 rows",
        "other-bits": "needs bits in (8,), here it is 4",
        "lacking": "needs no-such-library>=1 (it is not installed)",
        "unable": "no such instruction",
    }


def test_choose_and_explain_agree() -> None:
    registry = KernelRegistry(KERNELS)
    choice = registry.choose("matmul", "codebook", TRAITS, device="cpu", dtype="bfloat16", rows=3)
    assert choice is not None
    assert (choice.kernel.name, dict(choice.reasons)) == explain(registry)
    assert registry.choose("matmul", "affine", {}, device="meta", dtype="bfloat16") is None


def test_reasons_when_none_fits() -> None:
    chosen, reasons = explain(KernelRegistry(KERNELS, disable=["best", "second"]))
    assert chosen is None
    assert reasons["best"] == reasons["second"] == "disabled" and len(reasons) == 9


def test_a_forced_kernel_wins_over_a_cheaper_one() -> None:
    chosen, reasons = explain(KernelRegistry(KERNELS, force=["second"]))
    assert chosen == "second" and reasons["best"] == "second is forced"


def test_a_row_fewer_and_another_is_chosen() -> None:
    assert explain(KernelRegistry(KERNELS), rows=2)[0] == "few-rows"


def test_a_layout_binds() -> None:
    registry = KernelRegistry([kernel("plain", cost=0.1), kernel("packed", layout="p", cost=0.2)])
    chosen, reasons = explain(registry, layout="p")
    assert chosen == "packed" and "'p'" in reasons["plain"]


def test_names_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTMILL_KERNELS", "second")
    monkeypatch.setenv("QUANTMILL_DISABLE_KERNELS", "best")
    chosen, reasons = explain(KernelRegistry(KERNELS))
    assert chosen == "second" and reasons["best"] == "disabled"
    assert explain(KernelRegistry(KERNELS, environment=False))[0] == "best"
    monkeypatch.setenv("QUANTMILL_KERNELS", "no-such-kernel")
    with pytest.raises(QuantmillError, match="no-such-kernel"):
        KernelRegistry(KERNELS)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(discover=False)
    made._registered["kernels"].extend(("test", item) for item in KERNELS)
    monkeypatch.setattr("quantmill.cli.kernels.default_host", lambda: made)
    return made


def test_the_list(cli: Cli, host: Host) -> None:
    result = cli("kernels")
    assert result.code == 0
    rows = {line.split()[0]: line for line in result.out.splitlines()[3:-1]}
    assert set(rows) == {item.name for item in KERNELS}
    assert rows["best"].endswith("yes") and "no such instruction" in rows["unable"]
    assert "needs no-such-library>=1" in rows["lacking"]


def test_the_list_as_json(cli: Cli, host: Host) -> None:
    result = cli("kernels", "--json")
    found = {item["name"]: item for item in result.json["kernels"]}
    assert found["best"]["unavailable"] is None and found["few-rows"]["max_rows"] == 2
    assert found["other-bits"]["constraints"] == {"bits": [8]}
    assert result.json["findings"] == []


def test_the_list_survives_a_wrong_name_in_the_environment(
    cli: Cli, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTMILL_KERNELS", "no-such-kernel")
    text = cli("kernels")
    assert text.code == 1 and "best" in text.out and "QM-KERNEL-002" in text.err
    data = cli("kernels", "--json")
    assert data.code == 1 and len(data.json["kernels"]) == len(KERNELS)
    assert data.codes == ["QM-KERNEL-002"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model")


MODULE = "model.layers.0.mlp.up_proj"


def test_explain_a_module(cli: Cli, folder: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    data = cli("kernels", "--explain", folder, "bnb-nf4-dq", MODULE, "--json").json
    assert data["module"] == MODULE and data["traits"]["table"] == "nf4"
    asked = [(item["operation"], item["of"]) for item in data["operations"]]
    assert asked == [
        ("matmul", "weight"),
        ("dequantize", "weight"),
        ("quantize", "weight"),
        ("quantize", "weight.scale"),
    ]
    for item in data["operations"]:
        assert item["kernel"] not in item["not_chosen"]
    quantize = data["operations"][2]["not_chosen"]
    assert quantize["bnb-quantize-4bit-cuda"] == "is for cuda"
    text = cli("kernels", "--explain", folder, "bnb-nf4-dq", MODULE)
    assert text.code == 0 and "is for cuda" in text.out
    lacking = any(item["kernel"] is None for item in data["operations"])
    assert ("plain torch reference" in text.out) == lacking


def test_explain_a_quantized_checkpoint(cli: Cli, folder: Path) -> None:
    pytest.importorskip("quantmill_bnb")
    stored = folder.parent / "stored"
    assert cli("quantize", folder, stored, "bnb-int8").code == 0
    data = cli("kernels", "--explain", stored, MODULE, "--rows", "7", "--json").json
    assert data["traits"]["bits"] == 8 and data["rows"] == 7
    assert [item["operation"] for item in data["operations"]] == ["matmul", "dequantize"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.mlp.up_prj", "did you mean model.layers.0.mlp.up_proj?"),
        ("lm_head", "it stays float: the output head stays float"),
        ("model.norm", "it stays float"),
        ("nothing", "has no module 'nothing'"),
    ],
)
def test_a_module_that_can_not_be_explained(cli: Cli, folder: Path, name: str, words: str) -> None:
    pytest.importorskip("quantmill_bnb")
    result = cli("kernels", "--explain", folder, "bnb-nf4", name, "--json")
    assert result.code == 1 and result.codes == ["QM-CLI-007"]
    finding = result.json["findings"][0]
    assert words in finding["cause"] + finding["fix"]


def test_the_reasons_change_with_what_is_disabled(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("quantmill_bnb")
    pytest.importorskip("quantmill_cpu")
    monkeypatch.setenv("QUANTMILL_DISABLE_KERNELS", "cpu-quantize-codebook4")
    data = cli("kernels", "--explain", folder, "bnb-nf4", MODULE, "--json").json
    (quantize,) = [item for item in data["operations"] if item["operation"] == "quantize"]
    assert quantize["kernel"] is None
    assert quantize["not_chosen"]["cpu-quantize-codebook4"] == "disabled"
