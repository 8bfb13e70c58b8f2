"""The last steps of a loaded model: dtypes, computed buffers, ties, generation config."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.core_model_loading import WeightConverter

from quantmill.embedding import FormEmbedding

if TYPE_CHECKING:
    from quantmill_transformers.architecture import TransformersArchitecture

__all__ = ["LIBRARY", "finish_model"]

LIBRARY = Lock()
"""Held while transformers builds or initialises: it sets torch's default dtype and patches torch's
functions for the whole process, and two threads would restore each other's."""


def finish_model(architecture: TransformersArchitecture, model: nn.Module, device: str) -> None:
    """Make ``model``, filled with what the checkpoint has, a complete ``PreTrainedModel``."""
    base: Any = model
    _cast(architecture, model)
    _initialise(architecture, base, device)
    # A quantized weight is no parameter: who shares it was given its form, or the checkpoint had
    # one for it alone, whatever its config says of ties.
    parameters = dict(base.named_parameters(remove_duplicate=False))

    def plain(name: str) -> bool:
        return _unchanged(architecture, base, name.rpartition(".")[0])

    base.all_tied_weights_keys = {
        target: source
        for target, source in base.all_tied_weights_keys.items()
        if (target in parameters and (source in parameters or plain(source)))
        or (source in parameters and plain(target))
    }
    base.tie_weights(missing_keys=set(architecture.tied), recompute_mapping=False)
    _remember_names(architecture, base)
    _generation(architecture, base)
    base.config._name_or_path = architecture.headers.source.describe()
    model.eval()


def _unchanged(architecture: TransformersArchitecture, model: nn.Module, name: str) -> bool:
    """Whether a module is still of the class that transformers gave it."""
    return type(model.get_submodule(name)) is type(architecture.skeleton.get_submodule(name))


def _cast(architecture: TransformersArchitecture, model: nn.Module) -> None:
    # A module with any parameter in fp32 was read in fp32 as a whole; its others go back.
    for module in architecture.modules:
        if not module.keep_float or module.parts:
            continue
        if not _unchanged(architecture, model, module.name):
            continue
        owner = model.get_submodule(module.name)
        for local, parameter in module.parameters.items():
            tensor = getattr(owner, local)
            meta = architecture.shapes[parameter.name]
            wanted = architecture.policy.of(parameter.name, meta)
            if not tensor.is_meta and tensor.is_floating_point() and tensor.dtype != wanted:
                tensor.data = tensor.data.to(wanted)


def _initialise(architecture: TransformersArchitecture, base: Any, device: str) -> None:
    """Let transformers compute what no checkpoint stores: buffers, and parameters that may be
    missing. Everything that was loaded is marked, or it would be drawn anew."""
    absent = {*architecture.tied, *architecture.elsewhere}
    for name, module in base.named_modules():
        prefix = f"{name}." if name else ""
        complete = True
        for store in (module._parameters, module._buffers):
            for local, tensor in store.items():
                if tensor is None:
                    continue
                if tensor.is_meta and prefix + local not in absent:
                    store[local] = _empty(tensor, device)
                    complete = False
                else:
                    tensor._is_hf_initialized = True
        module._is_hf_initialized = complete
        if isinstance(module, FormEmbedding):
            module.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    with LIBRARY:
        base.initialize_weights()


def _empty(meta: Tensor, device: str) -> Tensor:
    value = torch.empty_like(meta, device=device)
    if isinstance(meta, nn.Parameter):
        return nn.Parameter(value, requires_grad=meta.is_floating_point())
    return value


def _remember_names(architecture: TransformersArchitecture, base: Any) -> None:
    """Let ``save_pretrained`` write the names that were read, as after ``from_pretrained``.

    A conversion that split or stacked what is quantized now can't be undone: its parameters are
    saved under the model's own names.
    """
    names = architecture.names
    lost = {
        id(conversion.converter)
        for name, conversion in names.conversions.items()
        if not _unchanged(architecture, base, name.rpartition(".")[0])
    }
    base._weight_conversions = [
        item
        for item in names.transforms
        if not (isinstance(item, WeightConverter) and id(item) in lost)
    ]


def _generation(architecture: TransformersArchitecture, base: Any) -> None:
    if not base.can_generate():
        return
    headers = architecture.headers
    if headers.generation_config:
        made = GenerationConfig.from_dict(dict(headers.generation_config))
    else:
        # Older checkpoints keep these settings in config.json.
        made = GenerationConfig.from_model_config(dict(headers.config))
    base.generation_config = made
