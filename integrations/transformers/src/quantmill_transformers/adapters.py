"""What is replaced in PEFT while an activation lasts: for quantmill's linears alone.

===============================================  ==================================================
attribute                                        what is new
===============================================  ==================================================
``LoraModel._create_new_module``                 LoRA finds a class for them
``_maybe_include_all_linear_layers``             ``target_modules="all-linear"`` means them too
``convert_peft_config_for_transformers``,        experts that are linears keep the names that were
``convert_peft_adapter_state_dict_...``          asked for: PEFT would rename them to stacks
===============================================  ==================================================

Everything else goes to PEFT's own functions.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, Final

from quantmill.takeover import Replaced

__all__ = ["PEFT_SYMBOL", "replaced_in_peft"]

PEFT_SYMBOL: Final = "peft.tuners.lora.model.LoraModel._create_new_module"
_TUNERS: Final = "peft.tuners.tuners_utils"
_CONVERSION: Final = "peft.utils.transformers_weight_conversion"


def replaced_in_peft(active: Callable[[], bool]) -> list[Replaced]:
    """Put the new attributes in place; while ``active()`` is false they do as the old ones did."""
    made = [_creation(sys.modules["peft.tuners.lora.model"], active)]
    # Versions of the range have not always had the others.
    for module, name, new in (
        (_TUNERS, "_maybe_include_all_linear_layers", _with_ours),
        (_CONVERSION, "convert_peft_config_for_transformers", _unless_apart),
        (_CONVERSION, "convert_peft_adapter_state_dict_for_transformers", _state_unless_apart),
    ):
        try:
            owner: Any = importlib.import_module(module)
            original = getattr(owner, name)
        except (ImportError, AttributeError):
            continue
        made.append(Replaced.put(f"{module}.{name}", owner, new(original, active)))
    return made


def _creation(module: Any, active: Callable[[], bool]) -> Replaced:
    original = module.LoraModel.__dict__["_create_new_module"].__func__

    @functools.wraps(original)
    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        from quantmill_transformers.lora import dispatch

        made = dispatch(target, adapter_name, lora_config, **kwargs) if active() else None
        return original(lora_config, adapter_name, target, **kwargs) if made is None else made

    return Replaced.put(PEFT_SYMBOL, module.LoraModel, staticmethod(create))


def _with_ours(original: Any, active: Callable[[], bool]) -> Any:
    @functools.wraps(original)
    def include(peft_config: Any, model: Any) -> Any:
        before = getattr(peft_config, "target_modules", None)
        result = original(peft_config, model)
        if active() and isinstance(before, str) and before.lower() == "all-linear":
            result.target_modules = set(result.target_modules) | _linears(model)
        return result

    return include


def _linears(model: Any) -> set[str]:
    """Names of ours, but for the output head, as PEFT leaves out a float one."""
    from quantmill_transformers.lora import is_ours

    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name
        for name, module in model.named_modules()
        if module is not head and hasattr(module, "in_features") and is_ours(module)
    }


def _apart(model: Any) -> bool:
    """Whether experts of a model are linears."""
    from quantmill.experts import LinearExperts

    return any(isinstance(part, LinearExperts) for part in model.modules())


def _unless_apart(original: Any, active: Callable[[], bool]) -> Any:
    @functools.wraps(original)
    def convert(peft_config: Any, model: Any, conversions: Any) -> Any:
        if active() and _apart(model):
            return None
        return original(peft_config, model=model, conversions=conversions)

    return convert


def _state_unless_apart(original: Any, active: Callable[[], bool]) -> Any:
    @functools.wraps(original)
    def convert(model: Any, peft_config: Any, adapter_state_dict: Any, **kwargs: Any) -> Any:
        if active() and _apart(model):
            return adapter_state_dict
        return original(model, peft_config, adapter_state_dict, **kwargs)

    return convert
