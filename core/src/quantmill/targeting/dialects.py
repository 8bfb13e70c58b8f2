"""The peers' skip lists as rules of our language."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantmill.targeting.types import Rule

__all__ = ["from_transformers_skip"]


def from_transformers_skip(value: Sequence[str], origin: str = "checkpoint") -> list[Rule]:
    """``llm_int8_skip_modules`` and ``modules_to_not_convert`` of transformers.

    There an entry matches from the start of a name up to a component's end, literally or as a
    regular expression, or as the end of a name.
    """
    rules = []
    for entry in value:
        if re.fullmatch(r"[\w.]+", entry):
            pattern = entry
        else:
            pattern = rf"re:(?:{entry})(?:\..*)?"
        rules.append(Rule(pattern, "skip", origin, reason=f"skip list: {entry}"))
    return rules
