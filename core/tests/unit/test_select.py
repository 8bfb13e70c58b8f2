"""METHOD as users write it, the merge with a checkpoint's config, and plugins that disagree."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from quantmill.config import MethodConfig
from quantmill.findings import QuantmillError, Severity
from quantmill.hookspecs import HOOK_API_VERSION, hookimpl
from quantmill.host import Host, Status
from quantmill.job import Job, Request, Selection
from quantmill.registrations import Capabilities, ConfigReader, Method, Preset, Requirement
from quantmill.stages.configure import configure
from quantmill.stages.select import detect, parse_method, select


class PaintConfig(MethodConfig):
    """What the fake method can be told."""

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"compute"})

    bits: int = 4
    gloss: bool = False
    name: str = ""
    compute: Literal["float32", "bfloat16"] = "float32"


class OtherConfig(MethodConfig):
    """Of the other fake method."""

    width: int = 1


def method(name: str, config: type[MethodConfig], **more: Any) -> Method:
    reference = f"{config.__module__}:{config.__qualname__}"
    return Method(name, "", reference, "a:B", "a:B", Capabilities(), **more)


PAINT = method(
    "paint",
    PaintConfig,
    quant_methods=("paint",),
    aliases=("lacquer",),
    presets=(Preset("paint-8", {"bits": 8, "gloss": True}),),
    refused={"paint-9": ("nine bits are too many to make", "take paint-8")},
)
OTHER = method("other", OtherConfig, quant_methods=("other",))
NEEDY = method("needy", OtherConfig, requirements=(Requirement("surely-not-installed", ">=3"),))


class Tin:
    """A config object of the fake method's library."""

    bits = 2


def from_tin(value: Any) -> dict[str, Any] | None:
    return {"quant_method": "paint", "bits": value.bits} if isinstance(value, Tin) else None


def detect_paint(headers: Any) -> dict[str, Any] | None:
    return {"quant_method": "paint", "bits": len(headers.tensors)}


def module(name: str, **hooks: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.QUANTMILL_API = HOOK_API_VERSION  # type: ignore[attr-defined]
    for key, value in hooks.items():
        setattr(made, key, value)
    return made


@pytest.fixture
def host() -> Host:
    @hookimpl
    def quantmill_methods() -> list[Method]:
        return [PAINT, OTHER, NEEDY]

    @hookimpl
    def quantmill_dialects() -> list[ConfigReader]:
        return [
            ConfigReader(
                "paint",
                ("paint",),
                "paint",
                marker_keys=("gloss",),
                detect=f"{__name__}:detect_paint",
                signs=(".pigment",),
                objects=(__name__.partition(".")[0],),
                from_object=f"{__name__}:from_tin",
            ),
            ConfigReader("other", ("other",), "other"),
        ]

    made = Host(discover=False)
    plugin = module(
        "fake", quantmill_methods=quantmill_methods, quantmill_dialects=quantmill_dialects
    )
    assert made.add(plugin, "fake").status is Status.OK
    return made


def job(host: Host, asked: Any = None, stored: dict[str, Any] | None = None) -> Job:
    config = {} if stored is None else {"quantization_config": stored}
    headers: Any = types.SimpleNamespace(config=config)
    return Job(host, headers, parse_method(asked, host))


def codes(error: QuantmillError) -> list[str]:
    return [item.code for item in error.findings]


# --- The grammar --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "raw"),
    [
        ("paint", "paint", {}),
        ("lacquer", "paint", {}),
        (" paint ", "paint", {}),
        ("paint-8", "paint", {"bits": 8, "gloss": True}),
        ("paint-8:bits=2", "paint", {"bits": 2, "gloss": True}),
        ("paint:bits=2,gloss=true", "paint", {"bits": 2, "gloss": True}),
        ("paint: bits=2 , name=x y ", "paint", {"bits": 2, "name": "x y"}),
        ("paint:name=a=b", "paint", {"name": "a=b"}),
        ("paint:compute=torch.bfloat16", "paint", {"compute": "torch.bfloat16"}),
        ("paint:", "paint", {}),
    ],
)
def test_short_names(host: Host, text: str, name: str, raw: dict[str, Any]) -> None:
    request = parse_method(text, host)
    assert (request.method, request.raw) == (name, raw)
    assert request.text == text.strip()


FULL: dict[str, Any] = {
    "method": "paint-8",
    "bits": 3,
    "skip": ["a", "b"],
    "include": "c",
    "assign": {"layers:0": "other:width=2", "d": {"quant_method": "paint", "bits": 2}},
}
YAML = """
method: paint-8
bits: 3
skip: [a, b]
include: c
assign:
  layers:0: other:width=2
  d: {quant_method: paint, bits: 2}
"""


def check_full(request: Request) -> None:
    assert request.method == "paint"
    assert request.raw == {"bits": 3, "gloss": True}
    assert (request.skip, request.include) == (("a", "b"), ("c",))
    first, second = request.assign.values()
    assert list(request.assign) == ["layers:0", "d"]
    assert (first.method, first.raw) == ("other", {"width": 2})
    assert (second.method, second.raw) == (None, {"quant_method": "paint", "bits": 2})


def test_dicts_json_and_files_mean_the_same(host: Host, tmp_path: Path) -> None:
    check_full(parse_method(FULL, host))
    check_full(parse_method(json.dumps(FULL), host))
    for name, text in {"m.json": json.dumps(FULL), "m.yaml": YAML, "m.yml": YAML}.items():
        (tmp_path / name).write_text(text)
        check_full(parse_method(tmp_path / name, host))
        check_full(parse_method(str(tmp_path / name), host))


def test_a_config_object_is_its_fields(host: Host) -> None:
    request = parse_method(PaintConfig(bits=8), host)
    assert (request.method, request.raw) == ("paint", {"bits": 8})
    made = select(job(host, PaintConfig(bits=8, compute="bfloat16")))
    assert [item.config for item in made.values()] == [PaintConfig(bits=8, compute="bfloat16")]


def test_a_peers_object_is_its_dict(host: Host) -> None:
    class PeerConfig:
        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": "paint", "bits": 2}

    request = parse_method(PeerConfig(), host)
    assert (request.method, request.raw) == (None, {"quant_method": "paint", "bits": 2})
    assert request.text == "PeerConfig"


def test_nothing_and_a_request_stay_what_they_are(host: Host) -> None:
    assert parse_method(None, host) == Request()
    request = Request({"bits": 1}, "paint")
    assert parse_method(request, host) is request


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        ("piant", "QM-SELECT-001", "did you mean paint?"),
        ("paint-88", "QM-SELECT-001", "did you mean paint-8?"),
        ("paint-9", "QM-SELECT-001", "nine bits are too many to make"),
        ("zzz", "QM-SELECT-001", "needy, other, paint, paint-8"),
        ("", "QM-SELECT-001", "use one of"),
        (42, "QM-SELECT-001", "'42'"),
        ({"method": "piant"}, "QM-SELECT-001", "did you mean paint?"),
        ({"assign": {"a": "piant"}}, "QM-SELECT-001", "did you mean paint?"),
        ("paint:bits", "QM-SELECT-002", "paint:bits=VALUE"),
        ("{", "QM-SELECT-002", "not valid JSON"),
        ('{"bits": }', "QM-SELECT-002", "not valid JSON"),
        ("surely-not-there.json", "QM-SELECT-002", "there is no file surely-not-there.json"),
        ("surely-not-there.yaml", "QM-SELECT-002", "there is no file"),
        ({"skip": 3}, "QM-SELECT-002", "lists of patterns"),
        ({"include": ["a", 3]}, "QM-SELECT-002", "lists of patterns"),
    ],
)
def test_malformed_methods(host: Host, value: Any, code: str, words: str) -> None:
    with pytest.raises(QuantmillError) as caught:
        parse_method(value, host)
    assert codes(caught.value) == [code]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "- 1\n- 2\n", "does not hold a mapping"),
        ("b.yaml", "a: [", "not valid JSON or YAML"),
        ("c.json", '{"a": 1', "not valid JSON or YAML"),
        ("d.json", "", "does not hold a mapping"),
    ],
)
def test_malformed_files(host: Host, tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(QuantmillError) as caught:
        parse_method(tmp_path / name, host)
    (finding,) = caught.value.findings
    assert (finding.code, finding.where) == ("QM-SELECT-002", name)
    assert words in finding.cause


def test_an_unknown_name_tells_of_a_plugin_that_can_not_be_used() -> None:
    host = Host(discover=False)
    host.add(types.ModuleType("old"), "bnb")
    with pytest.raises(QuantmillError, match=r"bnb \(wrong API version"):
        parse_method("bnb-nf4", host)


# --- Configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"quant_method": "paint"}, "paint"),
        ({"quant_method": "other", "width": 3}, "other"),
        ({"gloss": True}, "paint"),
        ({"method": "other"}, "other"),
    ],
)
def test_the_method_is_known_by_name_or_marker(host: Host, raw: dict[str, Any], name: str) -> None:
    found, config = configure(job(host), raw, "user")
    assert found == name
    assert isinstance(config, PaintConfig if name == "paint" else OtherConfig)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "nothing is set"),
        ({"bits": 4}, "no key that identifies a method"),
        ({"quant_method": "exl2"}, "no installed plugin reads quant_method 'exl2'"),
        ({"quant_method": "exl2", "gloss": True}, "'exl2'"),
    ],
)
def test_an_unknown_dialect_names_those_that_are_read(
    host: Host, raw: dict[str, Any], words: str
) -> None:
    for origin in ("user", "checkpoint"):
        with pytest.raises(QuantmillError) as caught:
            configure(job(host), raw, origin)
        (finding,) = caught.value.findings
        assert finding.code == "QM-CONFIG-010"
        assert words in finding.cause and "other, paint" in finding.fix


def test_a_checkpoint_is_read_leniently_and_a_user_strictly(host: Host) -> None:
    raw = {"quant_method": "paint", "varnish": 1}
    run = job(host)
    _, config = configure(run, raw, "checkpoint")
    assert config.to_checkpoint()["varnish"] == 1
    assert [(f.code, f.severity) for f in run.findings] == [("QM-CONFIG-004", Severity.WARNING)]
    with pytest.raises(QuantmillError) as caught:
        configure(run, raw, "user")
    assert codes(caught.value) == ["QM-CONFIG-001"]


# --- Selection and merge ------------------------------------------------------------------------


def test_a_method_is_selected_with_its_config_and_plugin(host: Host) -> None:
    run = job(host, "paint-8:bits=2")
    (selection,) = select(run).values()
    assert selection == Selection("paint-8:bits=2", PAINT, PaintConfig(bits=2, gloss=True), "fake")
    assert run.selections == {selection.label: selection}
    assert not run.prequantized


def test_a_quantized_checkpoint_selects_its_own_method(host: Host) -> None:
    run = job(host, None, {"quant_method": "paint", "bits": 8})
    (selection,) = select(run).values()
    assert (selection.method, selection.config) == (PAINT, PaintConfig(bits=8))
    assert run.checkpoint_config is selection and run.prequantized


def test_nothing_asked_of_a_float_checkpoint_is_an_error(host: Host) -> None:
    with pytest.raises(QuantmillError) as caught:
        select(job(host))
    assert codes(caught.value) == ["QM-SELECT-003"]
    assert "paint-8" in str(caught.value)


def test_several_methods_are_selected_under_labels_of_their_own(host: Host) -> None:
    run = job(host, {"method": "paint", "assign": {"a": "other:width=2", "b": "paint-8"}})
    selections = select(run)
    main, *rest = selections.values()
    assert main.config == PaintConfig()
    assert [item.config for item in rest] == [OtherConfig(width=2), PaintConfig(bits=8, gloss=True)]
    assert list(selections) == [item.label for item in selections.values()]
    alike = {"a": {"quant_method": "other"}, "b": {"quant_method": "other", "width": 5}}
    selections = select(job(host, {"quant_method": "paint", "assign": {**alike, "c": alike["a"]}}))
    assert [item.config for item in selections.values()] == [
        PaintConfig(),
        OtherConfig(),
        OtherConfig(width=5),
    ]


def test_a_runtime_field_may_change_on_top_of_a_checkpoint(host: Host) -> None:
    stored = {"quant_method": "paint", "bits": 8, "varnish": 1}
    run = job(host, "paint:compute=bfloat16,bits=8", stored)
    (selection,) = select(run).values()
    assert selection.config.model_dump() == PaintConfig(bits=8, compute="bfloat16").model_dump()
    assert selection.config.unknown == {"varnish": 1}
    assert run.checkpoint_config is not None
    assert run.checkpoint_config.config.model_dump() == PaintConfig(bits=8).model_dump()


def test_every_contradiction_with_a_checkpoint_shows_both_values(host: Host) -> None:
    stored = {"quant_method": "paint", "bits": 8}
    with pytest.raises(QuantmillError) as caught:
        select(job(host, "paint:bits=2,gloss=true,compute=bfloat16", stored))
    assert [(f.code, f.where) for f in caught.value.findings] == [
        ("QM-CONFIG-011", "bits"),
        ("QM-CONFIG-011", "gloss"),
    ]
    cause = caught.value.findings[0].cause
    assert "bits=8" in cause and "2" in cause


def test_what_a_user_does_not_say_is_no_contradiction(host: Host) -> None:
    stored = {"quant_method": "paint", "bits": 8, "compute": "bfloat16"}
    (selection,) = select(job(host, "paint", stored)).values()
    assert selection.config == PaintConfig(bits=8, compute="bfloat16")


def test_another_method_than_the_checkpoints_is_a_contradiction(host: Host) -> None:
    with pytest.raises(QuantmillError) as caught:
        select(job(host, "other", {"quant_method": "paint"}))
    (finding,) = caught.value.findings
    assert (finding.code, finding.where) == ("QM-CONFIG-011", "method")
    assert "paint" in finding.cause and "other" in finding.cause


def test_a_missing_library_is_said_with_its_version(host: Host) -> None:
    with pytest.raises(QuantmillError) as caught:
        select(job(host, "needy"))
    (finding,) = caught.value.findings
    assert finding.code == "QM-SELECT-005"
    assert finding.fix == 'pip install "surely-not-installed>=3"'


# --- Plugins that take part ---------------------------------------------------------------------


def selector(name: str, chosen: Method) -> types.ModuleType:
    @hookimpl
    def quantmill_select(job: Job, name: str) -> Selection | None:
        return Selection(name, chosen, PaintConfig(), plugin) if name == "paint" else None

    plugin = name
    return module(name, quantmill_select=quantmill_select)


def test_a_plugin_may_select_for_a_method(host: Host) -> None:
    host.add(selector("one", OTHER), "one")
    (selection,) = select(job(host, "paint")).values()
    assert (selection.method, selection.plugin) == (OTHER, "one")
    (selection,) = select(job(host, "other")).values()
    assert selection.plugin == "fake"


def test_two_plugins_that_select_different_methods_are_an_error_naming_both(host: Host) -> None:
    host.add(selector("one", OTHER), "one")
    host.add(selector("two", NEEDY), "two")
    with pytest.raises(QuantmillError) as caught:
        select(job(host, "paint"))
    (finding,) = caught.value.findings
    assert finding.code == "QM-SELECT-004"
    for word in ("one", "two", "other", "needy"):
        assert word in finding.cause


def test_a_plugin_may_read_a_dialect_before_the_core(host: Host) -> None:
    @hookimpl
    def quantmill_configure(
        job: Job, raw: dict[str, Any], origin: str
    ) -> tuple[str, MethodConfig] | None:
        return ("paint", PaintConfig(bits=1)) if raw.get("quant_method") == "exotic" else None

    host.add(module("exotic", quantmill_configure=quantmill_configure), "exotic")
    (selection,) = select(job(host, None, {"quant_method": "exotic"})).values()
    assert selection.config == PaintConfig(bits=1)
    (selection,) = select(job(host, "paint-8")).values()
    assert selection.config == PaintConfig(bits=8, gloss=True)


def test_stages_are_announced(host: Host) -> None:
    seen: list[str] = []
    host.trace(lambda name, given: seen.append(f"{name.rpartition('_')[2]} {given.get('stage')}"))
    select(job(host, "paint"))
    stages = [item for item in seen if item.startswith(("started", "finished"))]
    assert stages == [
        "started select",
        "started configure",
        "finished configure",
        "finished select",
    ]


def test_a_librarys_config_object_is_a_method(host: Host) -> None:
    request = parse_method(Tin(), host)
    assert request.raw == {"quant_method": "paint", "bits": 2} and request.text == "Tin"


@pytest.mark.parametrize(
    ("names", "config", "found"),
    [
        (("a.pigment", "b.weight"), {}, {"quant_method": "paint", "bits": 2}),
        (("a.weight",), {}, None),
        (("a.pigment",), {"quantization_config": {"quant_method": "other"}}, "other"),
    ],
)
def test_a_config_that_is_not_there_is_detected(
    host: Host, names: tuple[str, ...], config: dict[str, Any], found: Any
) -> None:
    source = types.SimpleNamespace(exists=lambda name: False)
    headers: Any = types.SimpleNamespace(
        tensors=dict.fromkeys(names), config=dict(config), source=source
    )
    detect(headers, host)
    stored = headers.config.get("quantization_config")
    assert (stored == found) if found != "other" else stored["quant_method"] == "other"
