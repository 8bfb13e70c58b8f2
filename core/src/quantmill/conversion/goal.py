"""What a conversion is to make: a format of some method, or floats of some dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantmill.config import MethodConfig
from quantmill.findings import QuantmillError, declare
from quantmill.job import Job
from quantmill.registrations import Method, resolve
from quantmill.stages.configure import configure
from quantmill.stages.select import parse_method

__all__ = ["FLOATS", "Goal", "read_goal"]

NOT_HERE = declare("QM-CONVERT-001", "A conversion can't choose modules")
FLOATS = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
"""What a user may write for floats, and torch's names."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Either ``dtype`` or ``method`` is set."""

    text: str
    """As the user wrote it."""
    dtype: str | None = None
    """Torch name of the dtype of all weights."""
    method: Method | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The user's config."""
    wanted: Mapping[str, Any] = field(default_factory=dict)
    """The fields that it fixes, as the method's config names them; all others follow the
    source."""

    def config(self) -> type[MethodConfig]:
        """The method's config class."""
        assert self.method is not None
        made: type[MethodConfig] = resolve(self.method.config)
        return made


def read_goal(job: Job, value: Any) -> Goal:
    """Parse METHOD of a conversion, which may also be a dtype.

    Raises:
        QuantmillError: it can't be read, names an unknown method, or chooses modules.
    """
    text = str(value).strip()
    name = text.removeprefix("torch.").lower()
    if name in FLOATS:
        return Goal(text, dtype=FLOATS[name])
    request = parse_method(value, job.host)
    if request.skip or request.include or request.assign:
        raise QuantmillError(
            NOT_HERE(
                text,
                "skip, include and assign choose what is quantized, and a conversion takes what"
                " the source has quantized",
                "leave them out; to quantize anew, use `quantmill quantize` on the float model",
            )
        )
    raw = {k: v for k, v in (request.raw or {}).items() if k not in request.implied}
    method = request.method
    if method is None:
        method, _ = configure(job, raw, "user")
    found = job.host.methods[method]
    config: type[MethodConfig] = resolve(found.config)
    wanted = {key: item for key, item in config.normalise(raw).items() if key != "unknown"}
    if wanted:
        config.from_user(raw)  # raises what is wrong with it now
    return Goal(request.label or text, method=found, raw=raw, wanted=wanted)
