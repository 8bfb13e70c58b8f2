"""The peers' dialects of skip lists and per-module options, as rules of our language.

Only the translation is here; which dialect a config speaks, its plugin says. ``origin`` is
``checkpoint`` or ``user``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantmill.targeting.types import Rule

__all__ = [
    "from_compressed_tensors",
    "from_gptq_dynamic",
    "from_hqq_dynamic",
    "from_torchao_fqn",
    "from_transformers_skip",
]


def from_transformers_skip(value: Sequence[str], origin: str = "checkpoint") -> list[Rule]:
    """``llm_int8_skip_modules`` and ``modules_to_not_convert`` of transformers.

    There an entry matches as a regular expression from the start of a name up to a component's
    end, or literally as the end of a name, at a component's start or not.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$)).*"
    return [
        Rule(
            _expression(rf"(?:{_grouped(entry)}){boundary}|.*{re.escape(entry)}"),
            "skip",
            origin,
            reason=f"skip list: {entry}",
        )
        for entry in value
    ]


def _expression(body: str) -> str:
    """A pattern of our language that is one regular expression: ``&`` would join two."""
    return "re:" + body.replace("&", r"\&")


def _grouped(expression: str) -> str:
    """An expression that may stand within another: flags at its start hold for it alone."""
    found = re.match(r"\(\?([aiLmsux]+)\)", expression)
    return f"(?{found.group(1)}:{expression[found.end() :]})" if found else expression


def from_gptq_dynamic(
    value: Mapping[str, Mapping[str, Any]], origin: str = "checkpoint"
) -> list[Rule]:
    """``dynamic`` of GPTQModel: regular expressions matched from the start of a name; the first
    that matches decides. ``-:`` skips, ``+:`` or nothing gives other options."""
    rules = []
    for index, (entry, options) in enumerate(value.items()):
        sign, colon, body = entry.partition(":")
        if not colon or sign not in ("+", "-"):
            sign, body = "+", entry
        reason = f"dynamic: {entry}"
        # Matched from the start only, so the rest of the name may be anything.
        pattern, order = _expression(f"(?:{_grouped(body)}).*"), len(value) - index
        if sign == "-":
            rules.append(Rule(pattern, "skip", origin, reason=reason, order=order))
        else:
            rules.append(
                Rule(
                    pattern,
                    "configure",
                    origin,
                    reason=reason,
                    options=dict(options),
                    order=order,
                    optional=True,
                )
            )
    return rules


def from_compressed_tensors(
    groups: Mapping[str, Mapping[str, Any]], ignore: Sequence[str], origin: str = "checkpoint"
) -> list[Rule]:
    """``config_groups`` and ``ignore`` of compressed-tensors.

    A target or an ignored entry is a module's name, ``re:`` with an expression matched from the
    start of a name, or a class name; names outrank expressions, and those outrank classes. What
    no group targets is not quantized. A rule's options are the group without its targets.
    """
    reason = "no config group targets it"
    rules = [Rule("**", "skip", origin, reason=reason, order=-1, optional=True)]
    rules += [
        # An ignored module stays float whatever a group says.
        Rule(pattern, "skip", origin, reason=f"ignore: {entry}", order=1 << 20, optional=True)
        for entry in ignore
        for pattern, _ in [_compressed_pattern(entry, 0)]
    ]
    # Of several expressions that match, the library takes the first by text.
    texts = sorted(
        {str(entry) for group in groups.values() for entry in group.get("targets") or ()}
    )
    last = len(texts) + 1
    for name, group in groups.items():
        options = {key: item for key, item in group.items() if key != "targets"}
        rules += [
            Rule(
                pattern,
                "include",
                origin,
                reason=f"config group {name}",
                options=options,
                order=order if order != 1 else last - texts.index(str(entry)),
                optional=True,
            )
            for entry in group.get("targets") or ()
            for pattern, order in [_compressed_pattern(entry, last)]
        ]
    return rules


def _compressed_pattern(entry: str, last: int) -> tuple[str, int]:
    """The pattern of a target and its order: 0 for a class, 1 for an expression, above ``last``
    for a name."""
    if entry.startswith("re:"):
        return _expression(f"(?:{_grouped(entry[3:])}).*"), 1
    if re.fullmatch(r"[A-Z]\w*", entry):
        return f"cls:{entry}", 0
    return f"re:{re.escape(entry)}", last + 1


def from_torchao_fqn(value: Mapping[str, Any], origin: str = "checkpoint") -> list[Rule]:
    """``FqnToConfig`` of torchao: full names first, then ``re:`` expressions in their order, then
    ``_default``. ``None`` skips. A rule's option ``config`` is the entry's value."""
    rules = []
    count = len(value)
    for index, (entry, config) in enumerate(value.items()):
        if entry == "_default":
            pattern, order = "**", 0
        elif entry.startswith("re:"):
            pattern, order = _expression(_grouped(entry[3:])), count - index
        else:
            pattern, order = f"re:{re.escape(entry.removesuffix('.weight'))}", count + 1
        if config is None:
            action: Any = "skip"
        else:
            action = "configure" if entry == "_default" else "include"
        rules.append(
            Rule(
                pattern,
                action,
                origin,
                reason=f"module config: {entry}",
                options=None if config is None else {"config": config},
                order=order,
                optional=True,
            )
        )
    if "_default" not in value:
        rules.append(Rule("**", "skip", origin, reason="no module config names it", optional=True))
    return rules


def from_hqq_dynamic(
    value: Mapping[str, Mapping[str, Any]], origin: str = "checkpoint"
) -> list[Rule]:
    """``dynamic_config`` of HQQ: the end of a module's name within its block
    (``self_attn.q_proj``) to other options."""
    return [
        Rule(
            entry,
            "configure",
            origin,
            reason=f"dynamic config: {entry}",
            options=dict(options),
            optional=True,
        )
        for entry, options in value.items()
    ]
