"""``quantmill kernels``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from quantmill.cli.exits import OK, PROBLEM
from quantmill.cli.options import DEVICE, DTYPES, JSON
from quantmill.cli.output import print_json, show_findings, table
from quantmill.findings import Findings, QuantmillError
from quantmill.host import Host, default_host

if TYPE_CHECKING:
    from quantmill.forms import Form
    from quantmill.job import Job
    from quantmill.planning import ModulePlan
    from quantmill.registrations import Kernel

_REFERENCE = "none: the form's plain torch reference is used"


@click.command("kernels")
@click.argument("what", nargs=-1, metavar="[SOURCE [METHOD] MODULE]")
@click.option("--explain", is_flag=True, help="Which kernel MODULE's form gets, and why.")
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of unquantized weights and activations, for --explain.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows of activations, for --explain.",
)
@JSON
def command(
    what: tuple[str, ...], explain: bool, device: str, dtype: str | None, rows: int, as_json: bool
) -> int:
    """List the kernels; with --explain, say which one a module would use and why.

    METHOD is left out for a SOURCE that is quantized already.
    """
    if not explain:
        if what:
            raise click.UsageError("SOURCE, METHOD and MODULE are for --explain")
        return _list(as_json)
    if len(what) not in (2, 3):
        raise click.UsageError("--explain takes SOURCE METHOD MODULE, or SOURCE MODULE")
    source, *method, module = what
    found = explain_module(source, method[0] if method else None, module, device, dtype, rows)
    if as_json:
        print_json(found)
    else:
        _show(found)
    return OK


def _list(as_json: bool) -> int:
    kernels, findings = describe_kernels(default_host())
    if as_json:
        problems = [item.to_dict() for item in findings]
        print_json({"kernels": kernels, "findings": problems})
        return PROBLEM if findings.errors else OK
    table(
        "kernels",
        ("kernel", "operation", "form", "device", "dtypes", ">cost", "rows", "layout", "here"),
        [
            (
                item["name"],
                item["operation"],
                item["form"],
                item["device"],
                ", ".join(item["dtypes"]),
                f"{item['cost']:g}",
                item["max_rows"] or "any",
                item["layout"],
                item["unavailable"] or "yes",
            )
            for item in kernels
        ],
    )
    show_findings(findings)
    return PROBLEM if findings.errors else OK


def devices_here() -> list[str]:
    """Types of the torch devices of this machine."""
    found = ["cpu"]
    try:
        import torch
    except ImportError:
        return found
    if torch.cuda.is_available():
        found.append("cuda")
    for name in ("xpu", "mps"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            found.append(name)
    return found


def describe_kernels(host: Host) -> tuple[list[dict[str, Any]], Findings]:
    """Every registered kernel as data, and what is wrong with the names in the environment."""
    from quantmill.kernels import KernelRegistry

    findings = Findings()
    try:
        registry = KernelRegistry.of(host)
    except QuantmillError as error:
        # The list is what one looks at to correct such a name: it must not fail over it.
        findings.extend(error.findings)
        registry = KernelRegistry.of(host, environment=False)
    devices = devices_here()
    described = []
    for item in registry.kernels:
        reason = registry.unavailable(item)
        if reason is None and item.device not in devices:
            reason = f"no {item.device} device here"
        if item.name in registry.disable:
            reason = "disabled"
        described.append(
            {
                "name": item.name,
                "operation": item.operation,
                "form": item.form,
                "device": item.device,
                "dtypes": list(item.dtypes),
                "constraints": {name: list(values) for name, values in item.constraints.items()},
                "cost": item.cost,
                "max_rows": item.max_rows,
                "layout": item.layout,
                "forced": item.name in registry.force,
                "unavailable": reason,
            }
        )
    return described, findings


def explain_module(
    source: str, method: str | None, name: str, device: str, dtype: str | None, rows: int
) -> dict[str, Any]:
    """The kernel of each operation on a module's form, and why each other one is not it.

    Raises:
        QuantmillError: no such module, or it stays float; and what planning raises.
    """
    from quantmill.api import make_job
    from quantmill.linear import FormLinearFactory
    from quantmill.stages.measure import describe_form
    from quantmill.stages.quantize import factory_of
    from quantmill.stages.select import select
    from quantmill.stages.target import make_plan

    job = make_job(source, method, device=device, dtype=dtype)
    select(job)
    entry = _entry(make_plan(job).modules, name)
    selection = job.selections[entry.method or next(iter(job.selections))]
    form = _form(job, entry)
    weight_dtype = str(form.dtype).removeprefix("torch.")
    own = selection.method.linear
    if own is not None and isinstance(factory_of(job, selection), FormLinearFactory):
        own = None  # it is the core's linear, with another layout on disk
    asked: list[tuple[str, str, Form, str]] = [
        ("matmul", "weight", form, job.compute_dtype),
        ("dequantize", "weight", form, job.compute_dtype),
    ]
    if not job.prequantized:
        asked += [
            ("quantize", part, piece, kind) for part, piece, kind in _parts(form, weight_dtype)
        ]
    return {
        "module": entry.name,
        "method": selection.label,
        "form": describe_form(form),
        "traits": dict(form.traits()),
        "shape": list(entry.shape),
        "device": device,
        "rows": rows,
        "linear": own,
        "operations": [
            _operation(job, operation, part, piece, kind, rows)
            for operation, part, piece, kind in asked
        ],
    }


def _parts(form: Form, dtype: str, name: str = "weight") -> list[tuple[str, Form, str]]:
    """The form and the forms nested in it; scales are quantized from float32."""
    from quantmill.forms import Form

    found = [(name, form, dtype)]
    for field in ("scale", "offset"):
        nested = getattr(form, field, None)
        if isinstance(nested, Form):
            found += _parts(nested, "float32", f"{name}.{field}")
    return found


def _operation(
    job: Job, operation: str, part: str, form: Form, dtype: str, rows: int
) -> dict[str, Any]:
    matmul = operation == "matmul"
    chosen: Kernel | None = None
    reasons: dict[str, str] = {}
    for kind, traits in form.facts() if matmul else [(form.kind, form.traits())]:
        chosen, reasons = job.kernels.explain(
            operation,
            kind,
            traits,
            device=job.device.partition(":")[0],
            dtype=dtype,
            rows=rows if matmul else None,
        )
        if chosen is not None:
            break
    return {
        "operation": operation,
        "of": part,
        "dtype": dtype,
        "kernel": chosen.name if chosen is not None else None,
        "cost": chosen.cost if chosen is not None else None,
        "not_chosen": reasons,
    }


def _entry(modules: list[ModulePlan], name: str) -> ModulePlan:
    from quantmill.cli.errors import NO_SUCH_MODULE
    from quantmill.config import suggestion

    quantized = [item for item in modules if item.action == "quantize"]
    for item in quantized:
        if item.name == name:
            return item
    near = suggestion(name, [item.name for item in quantized], cutoff=0.4)
    fix = near or "see the names in `quantmill plan --all`"
    for item in modules:
        if item.name == name:
            cause = f"it stays float: {item.reason}"
            raise QuantmillError(NO_SUCH_MODULE(name, cause, "name a module that is quantized"))
    raise QuantmillError(NO_SUCH_MODULE(name, f"the model has no module {name!r}", fix))


def _form(job: Job, entry: ModulePlan) -> Form:
    """The form the plan counted, on the meta device."""
    import torch

    from quantmill.checkpoint.reader import torch_dtype
    from quantmill.stages.quantize import codec_of, member_headers, quantizer_of

    target, architecture = entry.target, job.architecture
    assert target is not None and architecture is not None
    selection = job.selections[entry.method or next(iter(job.selections))]
    dtype: torch.dtype = getattr(torch, job.compute_dtype)
    if not job.prequantized:
        if job.dtype is None:
            dtype = torch_dtype(target.module.parameters[target.parameter].dtype)
        return quantizer_of(job, selection).abstract(target, dtype)
    codec = codec_of(job, selection)
    members = member_headers(architecture.module_prefix(target.module), codec, job.headers)
    form: Form | None = codec.describe(members, target, dtype)
    assert form is not None  # the plan found one
    return form


def _show(found: dict[str, Any]) -> None:
    rows: list[tuple[Any, ...]] = []
    for item in found["operations"]:
        if item["kernel"] is None:
            rows.append((item["operation"], item["of"], item["dtype"], "-", _REFERENCE))
        else:
            why = f"chosen, costs {item['cost']:g}"
            rows.append((item["operation"], item["of"], item["dtype"], item["kernel"], why))
        rows += [("", "", "", name, f"no: {why}") for name, why in item["not_chosen"].items()]
    shape = "x".join(map(str, found["shape"]))
    table(
        f"{found['module']}: {found['form']}, {shape} on {found['device']} ({found['method']})",
        ("operation", "of", "dtype", "kernel", "why"),
        rows,
    )
    if found["linear"] is not None:
        click.echo(
            f"{found['method']} has a linear of its own, {found['linear']}, which decides what it"
            " computes with: only the core's linear asks for matmul kernels."
        )
