"""The plugin host keeps plugins apart and says what became of each."""

from __future__ import annotations

import importlib.metadata as metadata
import sys
import types
from pathlib import Path

import pytest

from quantmill.findings import Findings, FindingsError, QuantmillError
from quantmill.hookspecs import HOOK_API_VERSION, hookimpl
from quantmill.host import Host, Status
from quantmill.registrations import Capabilities, Method, Preset, Requirement


def module(name: str, **attributes: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.QUANTMILL_API = HOOK_API_VERSION  # type: ignore[attr-defined]
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def method(name: str, *presets: str) -> Method:
    return Method(
        name,
        "",
        "a:B",
        "a:B",
        "a:B",
        Capabilities(),
        presets=tuple(Preset(preset, {}) for preset in presets),
    )


def methods_hook(*methods: Method) -> object:
    @hookimpl
    def quantmill_methods() -> list[Method]:
        return list(methods)

    return quantmill_methods


@pytest.fixture
def host() -> Host:
    return Host(discover=False)


def install(folder: Path, distribution: str, entry: str, source: str, requires: str = "") -> None:
    """Write an installed distribution as pip would leave it."""
    package = entry.split("=")[1].strip()
    (folder / f"{package}.py").write_text(source)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{needs}"
    )
    (info / "entry_points.txt").write_text(f"[quantmill.plugins]\n{entry}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions, and nothing else of the group."""
    monkeypatch.syspath_prepend(str(tmp_path))
    real = metadata.entry_points

    def only_here(**options: str):  # type: ignore[no-untyped-def]
        found = real(**options)
        return [
            item for item in found if item.dist and str(item.dist.locate_file("")) == str(tmp_path)
        ]

    monkeypatch.setattr(metadata, "entry_points", only_here)
    yield tmp_path
    for name in list(sys.modules):
        if name.startswith("hosttest_"):
            del sys.modules[name]


GOOD = f"QUANTMILL_API = {HOOK_API_VERSION}\n"


def test_a_good_plugin_is_ok_and_its_registrations_count(host: Host) -> None:
    info = host.add(module("good", quantmill_methods=methods_hook(method("m", "m-4"))), "good")
    assert info.status is Status.OK
    assert "m" in host.methods and "m-4" in host.presets
    assert info.provides["methods"] == ["m"]


def test_discovery_isolates_every_kind_of_failure(site: Path) -> None:
    install(site, "dist-good", "good = hosttest_good", GOOD)
    install(site, "dist-raises", "raises = hosttest_raises", "raise RuntimeError('boom')")
    install(site, "dist-exits", "exits = hosttest_exits", "import sys; sys.exit(3)")
    install(site, "dist-old", "old = hosttest_old", "QUANTMILL_API = -1\n")
    install(site, "dist-silent", "silent = hosttest_silent", "")
    install(
        site,
        "dist-needy",
        "needy = hosttest_needy",
        "raise AssertionError('imported')",
        requires="surely-not-installed>=2",
    )
    found = {name: info.status for name, info in Host().plugins.items()}
    assert found == {
        "good": Status.OK,
        "raises": Status.BROKEN,
        "exits": Status.BROKEN,
        "old": Status.WRONG_API,
        "silent": Status.WRONG_API,
        "needy": Status.MISSING,
    }


def test_reasons_name_the_cause_and_the_fix(site: Path) -> None:
    install(site, "dist-raises", "raises = hosttest_raises2", "raise RuntimeError('boom')")
    install(site, "dist-needy", "needy = hosttest_needy2", GOOD, requires="surely-not-installed>=2")
    plugins = Host().plugins
    assert "RuntimeError: boom" in plugins["raises"].reason
    assert "surely-not-installed>=2" in plugins["needy"].reason
    assert plugins["needy"].fix == 'pip install "surely-not-installed>=2"'


def test_two_distributions_with_one_name_conflict_naming_both(site: Path) -> None:
    install(site, "dist-one", "same = hosttest_one", GOOD)
    install(site, "dist-two", "same = hosttest_two", GOOD)
    info = Host().plugins["same"]
    assert info.status is Status.CONFLICT
    assert "dist-one" in info.reason and "dist-two" in info.reason
    assert Host(disable=["dist-two"]).plugins["same"].status is Status.OK


def test_two_plugins_with_one_method_conflict_naming_both(host: Host) -> None:
    host.add(
        module("one", quantmill_methods=methods_hook(method("m"))), "one", distribution="d-one"
    )
    second = host.add(
        module("two", quantmill_methods=methods_hook(method("x", "m"))), "two", distribution="d-two"
    )
    assert second.status is Status.CONFLICT
    assert "d-one" in second.reason and "d-two" in second.reason
    assert list(host.methods) == ["m"]


@pytest.mark.parametrize("variable", ["QUANTMILL_DISABLE"])
def test_lists_from_the_environment(
    site: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    install(site, "dist-a", "a = hosttest_a", GOOD)
    install(site, "dist-b", "b = hosttest_b", GOOD)
    monkeypatch.setenv(variable, "a")
    statuses = {name: info.status for name, info in Host().plugins.items()}
    assert statuses == {"a": Status.DISABLED, "b": Status.OK}
    monkeypatch.delenv(variable)
    statuses = {name: info.status for name, info in Host(allow=["a"]).plugins.items()}
    assert statuses == {"a": Status.OK, "b": Status.DISABLED}


def test_strict_mode_raises_every_problem_at_once(site: Path) -> None:
    install(site, "dist-c", "c = hosttest_c", "raise RuntimeError")
    install(site, "dist-d", "d = hosttest_d", "QUANTMILL_API = 99")
    with pytest.raises(FindingsError) as caught:
        Host(strict=True)
    assert [item.where for item in caught.value.findings] == ["plugin c", "plugin d"]


def test_an_unknown_hook_is_refused(host: Host) -> None:
    @hookimpl
    def quantmill_quantise() -> None:
        return None

    info = host.add(module("typo", quantmill_quantise=quantmill_quantise), "typo")
    assert info.status is Status.BROKEN and "quantmill_quantise" in info.reason
    host.check_pending()


def test_a_hook_with_unknown_arguments_is_refused(host: Host) -> None:
    @hookimpl
    def quantmill_validate(job: object, nonsense: object) -> list[object]:
        return []

    info = host.add(module("args", quantmill_validate=quantmill_validate), "args")
    assert info.status is Status.BROKEN and "nonsense" in info.reason


def test_a_registration_that_raises_takes_nothing_else_down(host: Host) -> None:
    @hookimpl
    def quantmill_methods() -> list[Method]:
        raise ValueError("no")

    info = host.add(module("bad", quantmill_methods=quantmill_methods), "bad")
    assert info.status is Status.BROKEN
    assert host.add(module("ok"), "ok").status is Status.OK


def test_the_requirements_hook_is_checked_from_metadata(host: Host) -> None:
    @hookimpl
    def quantmill_requirements() -> list[Requirement]:
        return [Requirement("surely-not-installed", ">=1"), Requirement("pluggy", ">=99")]

    info = host.add(module("needs", quantmill_requirements=quantmill_requirements), "needs")
    assert info.status is Status.MISSING
    assert "surely-not-installed>=1" in info.fix and "pluggy>=99" in info.fix


def test_calls_can_be_traced(host: Host) -> None:
    seen: list[str] = []
    undo = host.trace(lambda name, arguments: seen.append(name))
    host.hook.quantmill_stage_started(job=None, stage="target")
    undo()
    host.hook.quantmill_stage_started(job=None, stage="target")
    assert seen == ["quantmill_stage_started"]


def test_an_exception_in_a_hook_names_the_plugin_and_the_hook() -> None:
    """The code is compiled under the plugin's name, as an imported module's is."""
    module = types.ModuleType("raising_plugin")
    source = """
from quantmill.hookspecs import hookimpl
QUANTMILL_API = 1

@hookimpl
def quantmill_validate(job):
    return helper()

def helper():
    raise ZeroDivisionError("no good")
"""
    exec(source, vars(module))
    host = Host(discover=False)
    host.add(module, "raising", distribution="quantmill-raising", version="3")
    with pytest.raises(QuantmillError) as caught:
        host.hook.quantmill_validate(job=None)
    (finding,) = caught.value.findings
    assert finding.code == "QM-PLUGIN-004"
    assert finding.where == "plugin raising: quantmill_validate"
    assert "ZeroDivisionError: no good" in finding.cause and "quantmill-raising 3" in finding.fix
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


LAZY = """
from quantmill.hookspecs import hookimpl
QUANTMILL_API = 1

@hookimpl
def quantmill_select(job, name):
    yield "nothing"
    raise ZeroDivisionError("no good")
"""
GOOD = """
from quantmill.hookspecs import hookimpl
QUANTMILL_API = 1

@hookimpl
def quantmill_select(job, name):
    return ["a selection"]
"""


def test_a_plugin_that_a_job_does_not_need_is_left_out_with_a_warning() -> None:
    host = Host(discover=False)
    for name, source in (("lazy", LAZY), ("good", GOOD)):
        made = types.ModuleType(f"quantmill_{name}")
        exec(source, vars(made))
        host.add(made, name, distribution=f"quantmill-{name}", version="3")

    def job_of(plugin: str) -> types.SimpleNamespace:
        selections = {"a": types.SimpleNamespace(plugin=plugin)}
        return types.SimpleNamespace(
            selections=selections, architecture=None, container=None, findings=Findings()
        )

    job = job_of("good")
    assert host.hook.quantmill_select(job=job, name="x") == [["a selection"]]
    (finding,) = job.findings
    assert finding.code == "QM-PLUGIN-005" and finding.where == "plugin lazy: quantmill_select"
    assert "ZeroDivisionError: no good" in finding.cause and "quantmill-lazy 3" in finding.fix
    (hard,) = job.findings.strict().errors
    assert hard.code == "QM-PLUGIN-005"
    with pytest.raises(QuantmillError, match="QM-PLUGIN-004"):
        host.hook.quantmill_select(job=job_of("lazy"), name="x")
    unsettled = job_of("")
    unsettled.selections.clear()
    with pytest.raises(QuantmillError, match="QM-PLUGIN-004"):
        host.hook.quantmill_select(job=unsettled, name="x")
