"""LoRA of PEFT on quantmill's linears, whichever backend they are of.

PEFT's list of linear classes is closed, but for one door: a ``LoraConfig`` may bring classes of
its own (``_register_custom_module``). :func:`lora_config` goes through it. With an activation it
is not needed: ``LoraModel._create_new_module`` asks :func:`dispatch` first then.

Linears that are a vendor's own class (bitsandbytes) stay with PEFT's class for that vendor.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Final, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from quantmill.backend import NonFiniteWeight
from quantmill.findings import QuantmillError, declare
from quantmill.linear import FormLinear
from quantmill.stages.origin import Origin, origin_of

__all__ = ["LoraLinear", "QuantizedLinear", "dispatch", "lora_config"]

NOT_TRAINABLE = declare("QM-TF-030", "An adapter can't be put on weights of this method")
NO_VARIANT = declare("QM-TF-031", "The LoRA options need a float weight")
CANT_MERGE = declare("QM-TF-032", "An adapter can't be merged into weights of this method")
BROKEN_ADAPTER = declare("QM-TF-033", "An adapter holds NaN or infinity")

Config = TypeVar("Config", bound=LoraConfig)
_STARTS: Final = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that neither read nor change the base's weight."""


class _OfAJob(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return is_ours(instance)


class QuantizedLinear(metaclass=_OfAJob):
    """Any quantized linear that PEFT has no class for, as the key of a custom module."""


def is_ours(module: Any) -> bool:
    """Whether a job of quantmill made ``module``, and PEFT has no class of its own for it."""
    if not isinstance(module, nn.Module) or origin_of(module) is None:
        return False
    # A class of a vendor derives from the vendor's, which PEFT knows.
    return isinstance(module, FormLinear) or not isinstance(module, nn.Linear)


def lora_config(config: Config) -> Config:
    """A copy of a ``LoraConfig`` that knows quantmill's linears; for use without activation."""
    made = copy.deepcopy(config)
    made._register_custom_module({QuantizedLinear: LoraLinear})
    return made


def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    """The adapter's module for ``target``, or None where PEFT knows better."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not is_ours(base):
        return None
    return LoraLinear(target, adapter_name, config=config, **kwargs)


class LoraLinear(PeftLinear):
    """LoRA beside a quantized linear.

    Merging quantizes the sum of weight and adapter anew, where the method can do so without
    calibration data; the module that was there before is kept, so that unmerging is exact.
    """

    merged_adapters: list[str]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        origin = _origin(base_layer)
        method = origin.selection.method
        if not method.capabilities.trainable:
            raise QuantmillError(
                NOT_TRAINABLE(
                    origin.target.name,
                    f"{method.name} declares that no gradients flow through its linears",
                    "take a trainable method (quantmill doctor lists them), or leave it out of"
                    " target_modules",
                )
            )
        _check_options(origin, config)
        self._before: nn.Module | None = None
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        # Whatever the float module was (Conv1D), these are [out, in].
        self.fan_in_fan_out = False

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        # PEFT warns of classes that it has no table entry for.
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """No variant but the plain one."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantize weight and adapters as one. ``safe_merge`` changes nothing: NaN is refused.

        Raises:
            QuantmillError: the method needs calibration data; an adapter holds NaN.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        base = self._before or self.get_base_layer()
        origin = _origin(base)
        form = origin.form_of(base)
        if form is None or not origin.selection.method.capabilities.on_the_fly:
            why = f"{origin.selection.label} can't quantize a weight without calibration data"
            raise QuantmillError(
                CANT_MERGE(
                    origin.target.name,
                    why if form is not None else "the weight is offloaded",
                    "keep the adapter beside it; or model.dequantize() first, and merge into the"
                    " float model",
                )
            )
        merged = [*self.merged_adapters, *names]
        weight = form.dequantize(torch.float32)
        for name in merged:
            weight += self.get_delta_weight(name).to(weight)
        bias = _bias(self, base, merged)
        try:
            new = origin.build(origin.quantize(weight.to(form.dtype)), bias)
        except NonFiniteWeight as error:
            raise QuantmillError(
                BROKEN_ADAPTER(
                    origin.target.name,
                    f"with {', '.join(merged)} merged, {error.cause(tuple(weight.shape))}",
                    "train the adapter again",
                )
            ) from None
        self._before = base
        self.base_layer = new.train(base.training)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Put the module back that was there before the first merge: exactly the old weight."""
        if not self.merged or self._before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer, self._before = self._before, None
        self.merged_adapters = []

    def __setattr__(self, name: str, value: Any) -> None:
        # Kept beside the tree: it is no part of the model while the merged one is in its place.
        if name == "_before":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def _origin(module: nn.Module) -> Origin:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    found = origin_of(base)
    assert found is not None, "dispatched for quantized linears only"
    return found


def _bias(layer: Any, base: Any, names: list[str]) -> Tensor | None:
    bias: Tensor | None = getattr(base, "bias", None)
    for name in names:
        if not layer.lora_bias[name]:
            continue
        if bias is None:
            raise QuantmillError(
                CANT_MERGE(
                    _origin(base).target.name,
                    f"adapter {name} has a bias, and the base has none to add it to",
                    "train with lora_bias=False",
                )
            )
        bias = bias + (layer.lora_B[name].bias * layer.scaling[name]).to(bias)
    return bias


def _check_options(origin: Origin, config: Any) -> None:
    named = ("use_dora", "use_qalora", "use_bdlora", "arrow_config", "velora_config")
    asked = [name for name in named if getattr(config, name, None)]
    if config.init_lora_weights not in _STARTS:
        asked.append(f"init_lora_weights={config.init_lora_weights!r}")
    if asked:
        raise QuantmillError(
            NO_VARIANT(
                origin.target.name,
                f"{', '.join(asked)} would read and change the float weight, which is quantized",
                "leave them out: plain LoRA and rsLoRA work",
            )
        )
