"""The kernel registry: the cheapest that fits, and a reason for every other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill.findings import QuantmillError
from quantmill.hookspecs import HOOK_API_VERSION, hookimpl
from quantmill.host import Host
from quantmill.kernels import KernelRegistry
from quantmill.registrations import Kernel, Requirement

asked: list[str] = []


def yes() -> str | None:
    asked.append("yes")
    return None


def no() -> str | None:
    return "no AVX-512 here"


def broken() -> str | None:
    raise OSError("libfast.so: no such file")


def kernel(name: str, **more: Any) -> Kernel:
    fields: dict[str, Any] = {
        "operation": "matmul",
        "form": "affine",
        "implementation": "math:hypot",
    }
    return Kernel(name=name, **{**fields, **more})


def choose(
    kernels: Sequence[Kernel] | KernelRegistry, **changes: Any
) -> tuple[str | None, dict[str, str]]:
    """The name chosen, and the reasons of the others."""
    registry = kernels if isinstance(kernels, KernelRegistry) else KernelRegistry(kernels)
    wanted: dict[str, Any] = {"device": "cpu", "dtype": "float32", "traits": {"bits": 4}, **changes}
    chosen, reasons = registry.explain("matmul", "affine", **wanted)
    choice = registry.choose("matmul", "affine", **wanted)
    if choice is None:
        assert chosen is None
        return None, reasons
    assert (choice.kernel, choice.reasons) == (chosen, reasons)
    return choice.kernel.name, reasons


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTMILL_KERNELS", raising=False)
    monkeypatch.delenv("QUANTMILL_DISABLE_KERNELS", raising=False)


def test_the_cheapest_is_chosen_in_any_order_of_registration() -> None:
    kernels = [kernel("slow", cost=2.0), kernel("fast", cost=0.1), kernel("medium", cost=0.5)]
    for listed in (kernels, kernels[::-1]):
        name, reasons = choose(listed)
        assert name == "fast"
        assert reasons == {
            "medium": "costs 0.5, not less than 0.1",
            "slow": "costs 2, not less than 0.1",
        }


def test_equal_costs_are_decided_by_name() -> None:
    assert choose([kernel("b"), kernel("a")]) == ("a", {"b": "costs 1, not less than 1"})


def test_the_implementation_is_imported_on_loading() -> None:
    registry = KernelRegistry([kernel("k")])
    choice = registry.choose("matmul", "affine", {}, device="cpu", dtype="float32")
    assert choice is not None and choice.load() is math.hypot
    lazy = KernelRegistry([kernel("k", implementation="surely_not_there:f")])
    choice = lazy.choose("matmul", "affine", {}, device="cpu", dtype="float32")
    assert choice is not None
    with pytest.raises(ImportError):
        choice.load()


def test_other_operations_and_forms_take_no_part() -> None:
    others = [kernel("q", operation="quantize", cost=0), kernel("c", form="codebook", cost=0)]
    why = {"c": "is for the form codebook"}
    assert choose([*others, kernel("k")]) == ("k", why)
    assert choose(others) == (None, why)
    assert choose([]) == (None, {})


@pytest.mark.parametrize(
    ("fields", "asked_for", "reason"),
    [
        ({"device": "cuda"}, {}, "is for cuda"),
        ({"dtypes": ("float16",)}, {}, "takes float16, not float32"),
        ({"dtypes": ("float16", "bfloat16")}, {}, "takes float16, bfloat16, not float32"),
        ({"max_rows": 4}, {"rows": 5}, "is for at most 4 rows"),
        ({"constraints": {"bits": (2, 3)}}, {}, "needs bits in (2, 3), here it is 4"),
        ({"constraints": {"g": (64,)}}, {}, "needs g in (64,), here it is None"),
        (
            {"requirements": (Requirement("surely-not-installed", ">=2"),)},
            {},
            "needs surely-not-installed>=2 (it is not installed)",
        ),
        ({"requirements": (Requirement("pluggy", ">=99"),)}, {}, "needs pluggy>=99 (version "),
        ({"available": f"{__name__}:no"}, {}, "no AVX-512 here"),
        ({"available": f"{__name__}:broken"}, {}, "OSError: libfast.so"),
        ({"available": "surely_not_there:f"}, {}, "ModuleNotFoundError"),
    ],
)
def test_a_kernel_that_does_not_fit_says_why(
    fields: dict[str, Any], asked_for: dict[str, Any], reason: str
) -> None:
    picky = kernel("picky", cost=0.1, **fields)
    name, reasons = choose([picky, kernel("plain")], **asked_for)
    assert name == "plain"
    assert reason in reasons["picky"] and list(reasons) == ["picky"]
    assert choose([picky], **asked_for) == (None, reasons)


@pytest.mark.parametrize(
    ("fields", "asked_for"),
    [
        ({"device": "cuda"}, {"device": "cuda"}),
        ({"device": "cuda"}, {"device": "cuda:1"}),
        ({"dtypes": ("bfloat16",)}, {"dtype": "bfloat16"}),
        ({"max_rows": 4}, {"rows": 4}),
        ({"max_rows": 4}, {"rows": None}),
        ({"constraints": {"bits": (2, 4)}}, {}),
        ({"constraints": {"group": (None, 64)}}, {}),
        ({"requirements": (Requirement("pluggy", ">=1"),)}, {}),
        ({"requirements": (Requirement("surely-not-installed", optional=True),)}, {}),
        ({"available": f"{__name__}:yes"}, {}),
    ],
)
def test_a_kernel_that_fits_is_chosen(fields: dict[str, Any], asked_for: dict[str, Any]) -> None:
    assert choose([kernel("k", cost=0.1, **fields), kernel("plain")], **asked_for)[0] == "k"


def test_compute_capability_counts_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    hopper = kernel(
        "hopper",
        device="cuda",
        cost=0.1,
        requirements=(Requirement("", compute_capability=(9, 0)),),
    )
    plain = kernel("plain", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    name, reasons = choose([hopper, plain], device="cuda:0")
    assert name == "plain"
    assert reasons["hopper"] == "needs compute capability 9.0, here it is 8.6"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose([hopper, plain], device="cuda:0")[0] == "hopper"
    name, reasons = choose([hopper, plain], device="cuda:1")
    assert name == "plain" and reasons["hopper"] == "torch sees no cuda:1 device here"


def test_a_prepared_weight_is_computed_in_its_layout() -> None:
    kernels = [kernel("tiled", cost=0.1, layout="tiles"), kernel("plain")]
    assert choose(kernels)[0] == "tiled"
    assert choose(kernels, layout="tiles")[0] == "tiled"
    name, reasons = choose(kernels, layout="rows")
    assert name is None and "'tiles'" in reasons["tiled"] and "'rows'" in reasons["plain"]


def test_availability_is_asked_once() -> None:
    registry = KernelRegistry([kernel("k", available=f"{__name__}:yes")])
    asked.clear()
    assert [choose(registry)[0] for _ in range(3)] == ["k"] * 3
    assert asked == ["yes"]
    assert registry.unavailable(registry.kernels[0]) is None


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_force_outranks_cost(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [kernel("fast", cost=0.1), kernel("slow"), kernel("other", operation="dequantize")]
    force = ["slow", "other"]
    if how == "environment":
        monkeypatch.setenv("QUANTMILL_KERNELS", " slow , other,")
        force = []
    assert choose(KernelRegistry(kernels, force=force)) == ("slow", {"fast": "slow is forced"})


def test_of_several_forced_kernels_the_cheapest_is_chosen() -> None:
    kernels = [kernel("a", cost=0.1), kernel("b", cost=0.2), kernel("c", cost=0.3)]
    name, reasons = choose(KernelRegistry(kernels, force=["b", "c"]))
    assert name == "b"
    assert reasons == {"a": "b is forced", "c": "costs 0.3, not less than 0.2"}


def test_a_forced_kernel_that_does_not_fit_is_among_the_reasons() -> None:
    kernels = [kernel("gpu", device="cuda"), kernel("plain")]
    assert choose(KernelRegistry(kernels, force=["gpu"])) == ("plain", {"gpu": "is for cuda"})


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_disabled_kernel_is_not_chosen(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [kernel("fast", cost=0.1), kernel("slow")]
    disable = ["fast"]
    if how == "environment":
        monkeypatch.setenv("QUANTMILL_DISABLE_KERNELS", "fast")
        disable = []
    assert choose(KernelRegistry(kernels, disable=disable)) == ("slow", {"fast": "disabled"})
    # Who disables and forces one kernel gets the safer of the two.
    registry = KernelRegistry(kernels, disable=disable, force=["fast"])
    assert choose(registry) == ("slow", {"fast": "disabled"})


def test_unknown_names_are_errors_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTMILL_KERNELS", "typo-c")
    assert KernelRegistry([kernel("k")], environment=False).force == set()
    with pytest.raises(QuantmillError) as caught:
        KernelRegistry([kernel("k")], force=["typo-b", "k"], disable=["typo-a"])
    assert [(item.code, item.where) for item in caught.value.findings] == [
        ("QM-KERNEL-002", "typo-a"),
        ("QM-KERNEL-002", "typo-b"),
        ("QM-KERNEL-002", "typo-c"),
    ]


def test_a_hosts_kernels_make_its_registry() -> None:
    class Plugin:
        QUANTMILL_API = HOOK_API_VERSION

        @staticmethod
        @hookimpl
        def quantmill_kernels() -> list[Kernel]:
            return [kernel("b", cost=0.5), kernel("a", cost=0.7)]

    host = Host(discover=False)
    host.add(Plugin, "plugin")
    registry = KernelRegistry.of(host, disable=["b"])
    assert [item.name for item in registry.kernels] == ["b", "a"]
    assert choose(registry)[0] == "a"


@given(
    st.lists(
        st.builds(
            kernel,
            st.sampled_from("abcdef"),
            operation=st.sampled_from(["matmul", "quantize"]),
            device=st.sampled_from(["cpu", "cuda"]),
            cost=st.sampled_from([0.1, 0.5, 1.0]),
            max_rows=st.sampled_from([None, 1, 8]),
            constraints=st.sampled_from([{}, {"bits": (4,)}, {"bits": (8,)}]),
        ),
        unique_by=lambda item: item.name,
    ),
    st.sampled_from([1, 4, 16]),
    st.sets(st.sampled_from("abcdef")),
)
def test_the_choice_is_the_best_and_every_loser_has_a_reason(
    kernels: list[Kernel], rows: int, force: set[str]
) -> None:
    names = {item.name for item in kernels}
    registry = KernelRegistry(kernels, force=force & names)
    name, reasons = choose(registry, rows=rows)
    fits = [
        item
        for item in kernels
        if item.operation == "matmul"
        and item.device == "cpu"
        and (item.max_rows is None or rows <= item.max_rows)
        and item.constraints.get("bits", (4,)) == (4,)
    ]
    others = {item.name for item in kernels if item.operation == "matmul"} - {name}
    assert {*reasons} == others and all(reasons.values())
    if not fits:
        assert name is None
        return
    best = min(
        [item for item in fits if item.name in force] or fits, key=lambda i: (i.cost, i.name)
    )
    assert name == best.name
