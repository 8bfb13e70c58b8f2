"""A job as diffusers' ``DiffusersQuantizer``: what the library asks of a quantized model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer

import quantmill
from quantmill.findings import declare
from quantmill.pretrained import all_capable, check_dequantizable
from quantmill.stages.table import stored_config

if TYPE_CHECKING:
    from quantmill.job import Job

__all__ = ["JobQuantizer", "StoredConfig", "mark", "unmark_model"]

CANT_DEQUANTIZE = declare("QM-DIFF-003", "The model can't be turned into a float one")
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


class StoredConfig:
    """A ``quantization_config`` as it is written."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = copy.deepcopy(data)
        self.quant_method = data.get("quant_method", "quantmill")

    def to_dict(self) -> dict[str, Any]:
        """A copy of the data."""
        return copy.deepcopy(self._data)


class JobQuantizer(DiffusersQuantizer):
    """Answers for a model that a job loaded, from the declared capabilities."""

    def __init__(self, job: Job) -> None:
        config: Any = StoredConfig(stored_config(job))
        super().__init__(config, pre_quantized=job.prequantized)
        self.job = job

    @property
    def is_serializable(self) -> bool:
        return all_capable(self.job, "serialisable")

    @property
    def is_trainable(self) -> bool:
        return all_capable(self.job, "trainable")

    @property
    def is_compileable(self) -> bool:
        return all_capable(self.job, "compileable")

    def dequantize(self, model: Any) -> Any:
        """The float model, in place."""
        check_dequantizable(self.job, CANT_DEQUANTIZE)
        return quantmill.dequantize(model)

    # Loading is not its business.
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model


def mark(job: Job, model: Any) -> None:
    """Let diffusers see that ``model`` is quantized."""
    if not isinstance(model, ModelMixin) or not hasattr(model, "quantmill_job"):
        return
    model.hf_quantizer = JobQuantizer(job)
    model.is_quantized = True
    # The library has special cases for names, which want vendors' modules.
    if getattr(model, "quantization_method", None) is None:
        model.quantization_method = "quantmill"


def unmark_model(model: Any) -> None:
    """Undo :func:`mark` and what backends set for the same purpose."""
    for name in _MARKS:
        model.__dict__.pop(name, None)
    model.is_quantized = False
    model._internal_dict = type(model._internal_dict)(
        {key: value for key, value in model._internal_dict.items() if key != "quantization_config"}
    )
