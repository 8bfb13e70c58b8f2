"""A job as transformers' ``HfQuantizer``: what the library asks of a quantized model.

``save_pretrained``, ``dequantize``, ``Trainer`` and ``generate`` look for ``model.hf_quantizer``.
The one here answers from the job's declared capabilities; loading is not its business.
"""

from __future__ import annotations

import copy
import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import quantmill
from quantmill.findings import Finding, Severity, declare
from quantmill.pretrained import all_capable, check_dequantizable
from quantmill.stages.table import stored_config

if TYPE_CHECKING:
    from torch import Tensor

    from quantmill.job import Job

__all__ = ["JobQuantizer", "StoredConfig", "mark_model", "unmark_model"]

CANT_DEQUANTIZE = declare("QM-TF-006", "The model can't be turned into a float one")
CANT_SAVE = declare(
    "QM-TF-007", "save_pretrained has no layout for the model's method", Severity.WARNING
)
log = logging.getLogger("quantmill_transformers")

_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


class StoredConfig(QuantizationConfigMixin):
    """A ``quantization_config`` as it is written, with its keys as attributes."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = copy.deepcopy(data)

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("_data", {})
        if name in data:
            return data[name]
        raise AttributeError(f"the quantization_config has no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """A copy of the data."""
        return copy.deepcopy(self._data)

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: what a default is, only its method knows."""
        return self.to_dict()


class JobQuantizer(HfQuantizer):
    """Answers for a model that a job loaded."""

    quantization_config: Any

    def __init__(self, job: Job) -> None:
        super().__init__(StoredConfig(stored_config(job)), pre_quantized=job.prequantized)
        self.job = job

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element as the plan counts them, for a ``device_map`` that is computed."""
        return self._sizes.get(param_name) or param.element_size()

    @cached_property
    def _sizes(self) -> dict[str, float]:
        assert self.job.plan is not None
        return {
            entry.target.weight_name: entry.bytes_memory / entry.parameters
            for entry in self.job.plan.modules
            if entry.action == "quantize" and entry.target is not None
        }

    def is_serializable(self) -> bool:
        able = all_capable(self.job, "serialisable")
        if not able:
            log.warning("%s", self._instead())
        return able

    def _instead(self) -> Finding:
        """What to do where ``save_pretrained`` can't."""
        names = {item.method.name for item in self.job.selections.values()}
        ending = next(
            (
                container.suffixes[0]
                for container in self.job.host.containers
                if container.write is not None and names <= set(container.methods)
            ),
            None,
        )
        fix = "dequantize() it first"
        if ending is not None:
            fix = f'quantmill.save(model, "model{ending}") writes a file; or {fix}'
        return CANT_SAVE(
            "save_pretrained", f"no folder can hold weights of {', '.join(sorted(names))}", fix
        )

    @property
    def is_trainable(self) -> bool:
        return all_capable(self.job, "trainable")

    @property
    def is_compileable(self) -> bool:
        return all_capable(self.job, "compileable")

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        check_dequantizable(self.job, CANT_DEQUANTIZE)
        # The library passes on what it has put into the config, which may be a name.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return quantmill.dequantize(model, wanted)


def mark_model(job: Job, model: Any) -> None:
    """Let transformers, PEFT and accelerate see that ``model`` is quantized."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "quantmill_job"):
        return
    model.hf_quantizer = JobQuantizer(job)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.is_quantized = True
    # The library has special cases for some names, which want vendors' modules: no name of those
    # unless the method's own plugin has set it.
    if getattr(model, "quantization_method", None) is None:
        model.quantization_method = "quantmill"


def unmark_model(model: Any) -> None:
    """Undo :func:`mark_model` and what backends set for the same purpose."""
    for name in _MARKS:
        model.__dict__.pop(name, None)
    if isinstance(model, PreTrainedModel):
        model.is_quantized = False
