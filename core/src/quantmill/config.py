"""Base of the typed configurations that methods declare.

A config is a frozen pydantic model with the peer's own field names. It is read in two ways:
*strict* for what a user gives (every unknown key is an error with a suggestion) and *lenient* for
what a checkpoint brings (unknown keys are findings and survive a round trip).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quantmill.findings import Finding, FindingCode, FindingsError, Severity, declare

__all__ = ["GroupSize", "MethodConfig", "dtype_name", "group_width", "suggestion"]

UNKNOWN_KEY = declare("QM-CONFIG-001", "A config has a key the method does not know")
INVALID_VALUE = declare("QM-CONFIG-002", "A config field has an invalid value")
EXCLUSIVE = declare("QM-CONFIG-003", "A config sets options that exclude each other")
UNKNOWN_KEPT = declare(
    "QM-CONFIG-004", "A checkpoint's config has a key nobody knows; it is kept", Severity.WARNING
)
INVALID_STORED = declare(
    "QM-CONFIG-005", "A checkpoint's config has an invalid value", Severity.ERROR
)
_EXTRA = {"type": "extra_forbidden"}
_SHOWN = 80
"""Characters of a wrong value that a finding shows; the message says what is wrong in it."""


def suggestion(word: str, known: Iterable[str], *, cutoff: float = 0.6, form: str = "{}") -> str:
    """``did you mean ...?``, or nothing when no known word is close; ``form`` is how a word is
    written."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {form.format(close[0])}?" if close else ""


def dtype_name(value: Any) -> Any:
    """``"bfloat16"`` for ``torch.bfloat16``, ``"torch.bfloat16"`` or itself."""
    text = str(value) if type(value).__module__ == "torch" else value
    return text.removeprefix("torch.") if isinstance(text, str) else text


def _group_size(value: int) -> int:
    if value != -1 and value < 8:
        raise ValueError("it is -1 (one group per row) or at least 8")
    return value


GroupSize = Annotated[int, AfterValidator(_group_size)]
"""A field: input columns that share a scale; -1 for one group per row."""


def group_width(size: int, columns: int) -> int:
    """Input columns per group of a row of so many, for a :data:`GroupSize`."""
    return columns if size == -1 else min(size, columns)


class MethodConfig(BaseModel):
    """What a method can be told. Subclasses declare the fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=False,
        populate_by_name=True,
        use_attribute_docstrings=True,  # they are the descriptions in `quantmill schema`
    )

    runtime_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that a user may set differently from a checkpoint, because they say how to compute
    and not what is stored."""
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of flags of which at most one may be true."""

    unknown: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """Keys of a checkpoint's config that this version does not know, kept for a round trip."""

    @classmethod
    def field_names(cls) -> list[str]:
        """Names accepted in a config, aliases included."""
        names = []
        for name, info in cls.model_fields.items():
            if name == "unknown":
                continue
            names.append(name)
            if isinstance(info.alias, str):
                names.append(info.alias)
        return names

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Peers' spellings to ours, before validation. Override to drop derived keys."""
        return {key: value for key, value in raw.items() if key not in ("quant_method", "method")}

    @classmethod
    def exclusive_findings(cls, raw: Mapping[str, Any]) -> list[Finding]:
        """Findings for flags that exclude each other; override for richer relations."""
        found = []
        for group in cls.exclusive:
            given = [name for name in group if raw.get(name)]
            if len(given) > 1:
                found.append(
                    EXCLUSIVE(
                        " and ".join(given),
                        f"{' and '.join(given)} are both set, and only one can be",
                        f"keep one of {', '.join(given)}",
                    )
                )
        return found

    @classmethod
    def from_user(cls, raw: Mapping[str, Any]) -> Self:
        """Read strictly.

        Raises:
            FindingsError: with every unknown key, invalid value and exclusion at once.
        """
        data = cls.normalise(raw)
        findings: list[Finding] = []
        if "unknown" in data:  # ours, for what checkpoints bring: no one sets it by hand
            del data["unknown"]
            findings.append(cls._finding({"loc": ("unknown",), **_EXTRA}, INVALID_VALUE))
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            findings += cls.exclusive_findings(data)
            findings += [cls._finding(item, INVALID_VALUE) for item in error.errors()]
        else:
            findings += cls.exclusive_findings(config._typed(data))
        if findings:
            raise FindingsError(findings)
        return config

    @classmethod
    def from_checkpoint(cls, raw: Mapping[str, Any]) -> tuple[Self, list[Finding]]:
        """Read leniently: unknown keys are kept and reported.

        Raises:
            FindingsError: a known field has a value that can't be right.
        """
        data = cls.normalise(raw)
        known = set(cls.field_names())
        unknown = {key: value for key, value in data.items() if key not in known}
        findings = [
            UNKNOWN_KEPT(
                f"quantization_config.{key}",
                f"{key!r} is not a field that {cls.__name__} knows",
                "nothing to do; it is written back unchanged",
            )
            for key in sorted(unknown)
        ]
        data = {key: value for key, value in data.items() if key in known}
        errors: list[Finding] = []
        try:
            config = cls.model_validate({**data, "unknown": unknown})
        except ValidationError as error:
            errors += cls.exclusive_findings(data)
            errors += [cls._finding(item, INVALID_STORED) for item in error.errors()]
        else:
            errors += cls.exclusive_findings(config._typed(data))
        if errors:
            raise FindingsError(errors)
        return config, findings

    @classmethod
    def contradictions(
        cls, first: Mapping[str, Any], second: Mapping[str, Any], but: Collection[str] = ()
    ) -> list[tuple[str, Any, Any]]:
        """Fields that two raw configs of one checkpoint both set, to different values: name, the
        first's value, the second's. Fields in ``but`` may differ.

        Raises:
            FindingsError: one of them has a value that can't be right.
        """
        pairs = []
        for raw in (first, second):
            data = cls.normalise(raw)
            config, _ = cls.from_checkpoint(raw)
            pairs.append({k: getattr(config, k) for k in data if k in cls.model_fields})
        one, other = pairs
        return [
            (name, one[name], other[name])
            for name in one
            if name in other and name not in but and (one[name] or None) != (other[name] or None)
        ]

    @classmethod
    def disagreements(
        cls,
        stored: Mapping[str, Any],
        beside: Mapping[str, Any],
        file: str,
        code: FindingCode,
        but: Collection[str] = (),
    ) -> Iterator[Finding]:
        """Findings of ``code``: where the config in ``file`` contradicts that in config.json, by
        :meth:`contradictions`, or one of the two can't be right."""
        try:
            differing = cls.contradictions(stored, beside, but)
        except FindingsError as error:
            for item in error.findings:
                yield code(f"{file}: {item.where}", item.cause, item.fix, check="config")
            return
        for name, inside, outside in differing:
            yield code(
                f"{file}: {name}",
                f"it says {outside!r}, config.json says {inside!r}",
                "correct or remove the wrong one",
                check="config",
            )

    def _typed(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The given data by field names and as validation read it: ``"false"`` is not true."""
        names = {info.alias or name: name for name, info in type(self).model_fields.items()}
        typed = {names.get(key, key): value for key, value in data.items()}
        return {key: getattr(self, key, value) for key, value in typed.items()}

    @classmethod
    def _finding(cls, error: Any, code: Any) -> Finding:
        path = ".".join(str(part) for part in error["loc"]) or cls.__name__
        if error["type"] == "extra_forbidden":
            hint = suggestion(path, cls.field_names())
            return UNKNOWN_KEY(
                path,
                f"{path}: {hint}" if hint else f"{path} is not a field of {cls.__name__}",
                f"use one of: {', '.join(cls.field_names())}" if not hint else "correct the name",
            )
        message = error["msg"].removeprefix("Value error, ")
        given = repr(error.get("input"))
        if len(given) > _SHOWN:
            given = f"{given[:_SHOWN]}…"
        finding: Finding = code(path, f"{path}={given}: {message}", "give a value the field allows")
        return finding

    def changed(self) -> dict[str, Any]:
        """Fields that differ from their defaults, those left out of the peer's dialect too."""
        return {
            name: getattr(self, name)
            for name, info in type(self).model_fields.items()
            if name != "unknown"
            and getattr(self, name) != info.get_default(call_default_factory=True)
        }

    def extra_files(self, stored: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files that the peer expects beside ``config.json``, from the config that is
        ``stored`` there; name to content."""
        return {}

    def keeping(self, modules: Sequence[str]) -> Self:
        """The config with ``modules`` added to the peer's skip list, where its dialect has one.

        Called with the names of modules that a user, a default or the architecture keeps float,
        so that a peer that reads the checkpoint keeps them too.
        """
        return self

    def shared(self, others: Sequence[Self]) -> dict[str, Any]:
        """Options to add to this config where modules with it and with ``others``, of the same
        class, are to be in one checkpoint of the peer's dialect: what that has for all of them."""
        return {}

    def thorough(self) -> dict[str, Any]:
        """Options to add to this config where time matters less than quality, as in a search for
        the best mixture: of those that buy quality for time, the ones that nobody has set."""
        return {}

    def joined(self, others: Mapping[str, Self]) -> dict[str, Any] | None:
        """One config of the peer's dialect for this and, per module, other configs of the same
        class; None where the dialect can't say so."""
        return None

    def to_checkpoint(self) -> dict[str, Any]:
        """The ``quantization_config`` to write, in the peer's dialect."""
        return {**self.model_dump(mode="json", by_alias=True), **self.unknown}

    def to_json(self) -> str:
        """The same as text; byte-stable: reading and writing it again gives the same bytes."""
        return json.dumps(self.to_checkpoint(), indent=2, sort_keys=True, ensure_ascii=False)

    def summary(self) -> str:
        """One line for tables."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return ", ".join(f"{key}={value}" for key, value in sorted(changed.items()))
