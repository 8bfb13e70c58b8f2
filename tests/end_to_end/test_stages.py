"""A framework calls single stages on a job of its own; plugins take part in each of them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantmill
from quantmill.api import make_job
from quantmill.findings import Finding, FindingsError, QuantmillError, declare
from quantmill.forms import Form
from quantmill.hookspecs import HOOK_API_VERSION, hookimpl
from quantmill.host import Host, Status
from quantmill.job import Job, Selection
from quantmill.registrations import Finalizer, TargetingRule, Validator
from quantmill.stages.configure import configure
from quantmill.stages.quantize import codec_of, quantizer_of, run
from quantmill.stages.replace import ModelSink, linear_for
from quantmill.stages.select import select
from quantmill.stages.target import make_plan
from quantmill.stages.validate import validate
from quantmill.targeting.types import Rule, Target

pytest.importorskip("quantmill_bnb")
DATA = Path(__file__).parents[1] / "data"
FLOAT, STORED = DATA / "tiny-llama", DATA / "bnb-nf4"
UP = "model.layers.0.mlp.up_proj"
POLICY = declare("QM-TEST-001", "A policy of this test")


def plugin(host: Host, name: str, **hooks: Any) -> None:
    """Add a plugin made of functions; it must be ok."""
    made = types.ModuleType(name)
    made.__dict__.update(QUANTMILL_API=HOOK_API_VERSION, **hooks)
    info = host.add(made, name)
    assert info.status is Status.OK, info.reason


@pytest.fixture
def host() -> Host:
    return Host()


@dataclass
class Collect:
    """A sink of a framework: keeps what it is given, in order."""

    forms: dict[str, Form] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put_form(
        self, selection: Selection, target: Target, form: Form, bias: Tensor | None
    ) -> None:
        assert target.name not in self.forms, "each target comes once"
        self.forms[target.name] = form

    def put_tensor(self, module: Any, parameter: Any, reader: Any) -> None:
        assert parameter.name not in self.tensors, "each tensor comes once"
        self.tensors[parameter.name] = reader.tensor(parameter.sources[0])


def prepared(source: Path, method: Any, host: Host, **options: Any) -> Job:
    job = make_job(source, method, host=host, **options)
    select(job)
    make_plan(job).raise_errors()
    validate(job)
    job.findings.raise_errors()
    return job


# -- stages one by one -----------------------------------------------------------------------------


def test_each_stage_fills_its_part_of_the_job(host: Host) -> None:
    job = make_job(FLOAT, "bnb-nf4", host=host)
    assert (job.selections, job.architecture, job.plan) == ({}, None, None)
    name, config = configure(job, {"load_in_4bit": True, "quant_method": "bitsandbytes"}, "user")
    assert (name, config.load_in_4bit, job.selections) == ("bnb", True, {})  # type: ignore[attr-defined]
    chosen = select(job)
    assert list(chosen) == ["bnb-nf4"] == list(job.selections) and job.plan is None
    plan = make_plan(job)
    assert job.plan is plan and job.architecture is not None
    assert {item.action for item in plan.modules} == {"quantize", "keep", "not-a-target"}
    validate(job)
    assert not job.findings.errors


@pytest.mark.parametrize("source", [FLOAT, STORED])
def test_quantizing_into_a_sink_of_ones_own(source: Path, host: Host) -> None:
    job = prepared(source, "bnb-nf4" if source == FLOAT else None, host)
    sink = Collect()
    run(job, sink)
    assert job.plan is not None
    planned = {item.name for item in job.plan.modules if item.action == "quantize"}
    assert set(sink.forms) == planned and len(planned) == 14
    stored = load_file(STORED / "model.safetensors")  # both are the peer's bytes
    codec = codec_of(job, job.selections[next(iter(job.selections))])
    for name, form in sink.forms.items():
        for suffix, tensor in codec.encode(form).items():
            assert torch.equal(tensor, stored.pop(f"{name}.{suffix}")), (name, suffix)
    for name, tensor in sink.tensors.items():
        assert torch.equal(tensor, stored.pop(name)), name
    assert stored == {}, "everything reached the sink"


def test_replacing_and_finalizing_by_hand_is_what_load_does(host: Host) -> None:
    job = prepared(FLOAT, "bnb-nf4", host)
    sink = Collect()
    run(job, sink)
    architecture, plan = job.architecture, job.plan
    assert architecture is not None and plan is not None
    model: Any = architecture.build()
    assert all(tensor.is_meta for tensor in model.parameters())
    selection = job.selections["bnb-nf4"]
    for entry in plan.modules:
        if entry.target is not None:
            linear = linear_for(job, selection, entry.target, sink.forms[entry.name], None)
            assert linear is not None
            model.set_submodule(entry.name, linear)
    for name, tensor in sink.tensors.items():
        owner, _, local = name.rpartition(".")
        setattr(model.get_submodule(owner), local, nn.Parameter(tensor))
    architecture.finish(model, "cpu")
    found = [
        item for answer in host.hook.quantmill_finalize(job=job, model=model) for item in answer
    ]
    assert found == [] and model.is_quantized and model.quantmill_job is job
    expected: Any = quantmill.load(FLOAT, "bnb-nf4")
    state, other = model.state_dict(), expected.state_dict()
    assert set(state) == set(other)
    assert all(torch.equal(tensor, other[key]) for key, tensor in state.items())
    ids = torch.arange(2, 14).reshape(1, 12)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_the_model_sink_leaves_nothing_on_the_meta_device(host: Host) -> None:
    job = prepared(STORED, None, host)
    assert job.architecture is not None
    model = job.architecture.build()
    run(job, ModelSink(job, model, job.architecture))
    job.architecture.finish(model, "cpu")
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def test_one_architecture_serves_several_jobs(host: Host) -> None:
    first = prepared(FLOAT, "bnb-nf4", host)
    second = make_job(FLOAT, "bnb-int8", host=host)
    second.architecture = first.architecture
    select(second)
    assert make_plan(second).totals["quantized"] == 14
    assert second.architecture is first.architecture
    assert first.plan is not second.plan


# -- observation -----------------------------------------------------------------------------------


def test_stages_are_announced_in_order_and_progress_grows(host: Host) -> None:
    seen: list[str] = []
    progress: list[tuple[int, int]] = []

    @hookimpl
    def quantmill_stage_started(job: Job, stage: str) -> None:
        seen.append(f"+{stage}")

    @hookimpl
    def quantmill_stage_finished(job: Job, stage: str, seconds: float) -> None:
        assert seconds >= 0
        seen.append(f"-{stage}")

    @hookimpl
    def quantmill_progress(done: int, total: int) -> None:
        progress.append((done, total))

    plugin(
        host,
        "tracer",
        quantmill_stage_started=quantmill_stage_started,
        quantmill_stage_finished=quantmill_stage_finished,
        quantmill_progress=quantmill_progress,
    )
    told: list[tuple[int, int, str]] = []
    quantmill.load(
        FLOAT,
        "bnb-nf4",
        host=host,
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert seen == [
        "+select",
        "+configure",
        "-configure",
        "-select",
        "+target",
        "-target",
        "+validate",
        "-validate",
        "+replace",
        "+quantize",
        "-quantize",
        "-replace",
        "+finalize",
        "-finalize",
    ]
    assert progress == [(done, total) for done, total, _ in told]
    assert progress == sorted(progress) and progress[-1][0] == progress[-1][1] > 0
    assert UP in [what for _, _, what in told]


def test_a_stage_that_fails_is_not_announced_as_finished(host: Host) -> None:
    seen: list[str] = []

    @hookimpl
    def quantmill_stage_finished(stage: str) -> None:
        seen.append(stage)

    plugin(host, "tracer", quantmill_stage_finished=quantmill_stage_finished)
    with pytest.raises(QuantmillError):
        quantmill.load(FLOAT, {"method": "bnb-nf4", "nonsense": 1}, host=host)
    assert seen == []


# -- answers to stages -----------------------------------------------------------------------------


def zeros(name: str) -> Callable[..., Form | None]:
    """A ``quantmill_quantize`` that makes one target zero and leaves the others to the method."""

    class Zero:
        def __init__(self, weight: Any) -> None:
            self.name, self.shape, self.dtype = weight.name, weight.shape, weight.dtype

        def tensor(self) -> Tensor:
            return torch.zeros(self.shape, dtype=self.dtype)

        def row_blocks(self, multiple: int = 1) -> Iterable[tuple[int, Tensor]]:
            yield 0, self.tensor()

    @hookimpl
    def quantmill_quantize(
        job: Job, selection: Selection, target: Target, weight: Any
    ) -> Form | None:
        if target.name != name:
            return None
        made: Form = quantizer_of(job, selection).quantize(target, Zero(weight))  # type: ignore[arg-type]
        return made

    return quantmill_quantize


def test_a_plugin_quantizes_one_target_its_own_way(host: Host, tmp_path: Path) -> None:
    plugin(host, "zero", quantmill_quantize=zeros(UP))
    plain = quantmill.load(FLOAT, "bnb-nf4").state_dict()
    model: Any = quantmill.load(FLOAT, "bnb-nf4", host=host)
    quantmill.quantize(FLOAT, tmp_path / "out", "bnb-nf4", host=host)
    for state in (model.state_dict(), load_file(tmp_path / "out" / "model.safetensors")):
        changed = {name for name in state if not torch.equal(state[name], plain[name])}
        assert changed == {f"{UP}.weight", f"{UP}.weight.absmax"}
    quantmill.dequantize(model)
    assert not model.get_submodule(UP).weight.any()


def test_a_plugin_replaces_one_linear_its_own_way(host: Host) -> None:
    class Own(nn.Linear):
        pass

    @hookimpl
    def quantmill_replace(target: Target, form: Form) -> nn.Module | None:
        if target.name != UP:
            return None
        made = Own(target.in_features, target.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(form.dequantize(torch.bfloat16), requires_grad=False)
        return made

    plugin(host, "own", quantmill_replace=quantmill_replace)
    model: Any = quantmill.load(FLOAT, "bnb-nf4", host=host)
    assert [name for name, part in model.named_modules() if isinstance(part, Own)] == [UP]
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable module, as import strings need it."""
    made = types.ModuleType("quantmill_test_policies")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.mark.parametrize(("methods", "asked"), [((), True), (("bnb",), True), (("gptq",), False)])
def test_a_registered_validator_takes_part(
    methods: tuple[str, ...], asked: bool, host: Host, policies: types.ModuleType
) -> None:
    def check(job: Job) -> Iterable[Finding]:
        yield POLICY("policy", "not on a Friday", "wait")

    policies.check = check  # type: ignore[attr-defined]
    registered = Validator("policy", "quantmill_test_policies:check", methods=methods)
    plugin(
        host, "policy", quantmill_validators=hookimpl(_named("quantmill_validators", registered))
    )
    codes = {item.code for item in quantmill.plan(FLOAT, "bnb-nf4", host=host).findings.errors}
    assert codes == ({"QM-TEST-001"} if asked else set())
    if asked:
        with pytest.raises(FindingsError, match="not on a Friday"):
            quantmill.load(FLOAT, "bnb-nf4", host=host)


def _named(name: str, *items: Any) -> Callable[[], list[Any]]:
    def hook() -> list[Any]:
        return list(items)

    hook.__name__ = name
    return hook


def test_validators_and_stage_hooks_report_together(host: Host, policies: types.ModuleType) -> None:
    @hookimpl
    def quantmill_validate(job: Job) -> Iterable[Finding]:
        assert job.plan is not None, "a plan precedes validation"
        return [POLICY("hook", "one", "none")]

    policies.check = lambda job: [POLICY("registered", "two", "none")]  # type: ignore[attr-defined]
    registered = Validator("policy", "quantmill_test_policies:check")
    plugin(
        host,
        "policy",
        quantmill_validate=quantmill_validate,
        quantmill_validators=hookimpl(_named("quantmill_validators", registered)),
    )
    with pytest.raises(FindingsError) as caught:
        quantmill.load(FLOAT, "bnb-nf4", host=host, max_memory={"cpu": 1000})
    assert {(item.code, item.where) for item in caught.value.findings} == {
        ("QM-TEST-001", "hook"),
        ("QM-TEST-001", "registered"),
        ("QM-MEMORY-001", "cpu"),
    }


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-int8"])
def test_a_targeting_rule_holds_for_all_methods_until_the_user_speaks(
    method: str, host: Host
) -> None:
    rule = TargetingRule("layers:-1", "skip", "the last block stays float")
    plugin(
        host,
        "careful",
        quantmill_targeting_rules=hookimpl(_named("quantmill_targeting_rules", rule)),
    )
    plan = quantmill.plan(FLOAT, method, host=host)
    last = [item for item in plan.modules if item.kind == "linear" and "layers.1." in item.name]
    assert {(item.action, item.origin) for item in last} == {("keep", "plugin:careful")}
    assert {item.reason for item in last} == {"the last block stays float"}
    assert plan.totals["quantized"] == 7
    name = "model.layers.1.mlp.down_proj"
    asked = quantmill.plan(FLOAT, method, host=host, include=[name])
    assert {
        item.name for item in asked.modules if item.action == "quantize" and "layers.1" in item.name
    } == {name}
    state = quantmill.load(FLOAT, method, host=host).state_dict()
    assert state[f"{name}.weight"].dtype == torch.bfloat16


def test_rules_of_a_hook_see_the_job(host: Host) -> None:
    @hookimpl
    def quantmill_target(job: Job) -> Iterable[Rule]:
        assert job.architecture is not None
        wide = [
            item.name
            for item in job.architecture.modules
            if item.kind == "linear" and max(item.parameters["weight"].shape) > 256
        ]
        return [Rule(name, "skip", "plugin:wide", reason="too wide") for name in wide]

    plugin(host, "wide", quantmill_target=quantmill_target)
    plan = quantmill.plan(FLOAT, "bnb-nf4", host=host)
    assert {item.name.rpartition(".")[2] for item in plan.modules if item.reason == "too wide"} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_a_finalizer_gets_the_finished_model(host: Host, policies: types.ModuleType) -> None:
    def finalize(job: Job, model: Any) -> list[Finding]:
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        model.touched = job.selections["bnb-nf4"].method.name
        return []

    policies.finalize = finalize  # type: ignore[attr-defined]
    registered = Finalizer("touch", "quantmill_test_policies:finalize")
    plugin(host, "touch", quantmill_finalizers=hookimpl(_named("quantmill_finalizers", registered)))
    model: Any = quantmill.load(FLOAT, "bnb-nf4", host=host)
    assert model.touched == "bnb"


def test_two_plugins_that_select_different_methods_conflict(host: Host) -> None:
    def selecting(other: str) -> Any:
        @hookimpl
        def quantmill_select(job: Job, name: str) -> Selection:
            method = replace(job.host.methods["bnb"], name=other)
            _, config = configure(job, {"load_in_4bit": True}, "user", method="bnb")
            return Selection(other, method, config, f"plugin-{other}")

        return quantmill_select

    plugin(host, "one", quantmill_select=selecting("first"))
    assert list(select(make_job(FLOAT, "bnb-nf4", host=host))) == ["first"]
    plugin(host, "two", quantmill_select=selecting("second"))
    with pytest.raises(QuantmillError) as caught:
        select(make_job(FLOAT, "bnb-nf4", host=host))
    assert [item.code for item in caught.value.findings] == ["QM-SELECT-004"]
    assert "plugin-first" in str(caught.value) and "plugin-second" in str(caught.value)
