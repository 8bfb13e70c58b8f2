"""Forms as torchao's tensor subclasses, which its functions and ``torch.nn.Linear`` take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantmill.forms import Form
from quantmill_torchao.codec import TorchaoCodec
from quantmill_torchao.config import TorchaoConfig
from quantmill_torchao.foreign import stored_form

__all__ = ["to_tensor"]


def to_tensor(form: Form) -> Tensor:
    """The tensor of torchao that ``form`` is the weight ``[out, in]`` of; codes of 8 bits and
    floats share their memory with it.

    Raises:
        QuantmillError: torchao has no tensor for such a form.
        ImportError: this version of torchao can't be used with this version of PyTorch.
    """
    from torchao.prototype.safetensors.safetensors_utils import object_from_dict

    from quantmill_torchao.notes import parse

    config = TorchaoConfig()
    form = stored_form(form, config)
    note: Any = parse(form.layout.note)
    stored = TorchaoCodec(config).encode(form)
    for name, tensor in stored.items():
        note["_data"][name.removeprefix("_weight_")] = tensor
    note["_data"]["block_size"] = list(note["_data"]["block_size"])
    if "shape" in note["_data"]:
        note["_data"]["shape"] = torch.Size(note["_data"]["shape"])
    made: Tensor = object_from_dict(note)
    return made
