"""vLLM reads folders on a machine without a GPU: the child of ``interop_vllm.py``.

    PYTHON benchmarks/vllm_reader.py FOLDER...      PYTHON of an environment with vLLM

vLLM chooses by the GPU and its compiled operators. Neither is needed to parse a config, to make the
layers and to load their tensors, so a platform that says it is an H200 stands in for the first, and
empty modules for the second. One line of JSON for each folder: the quantization that vLLM takes,
how many parameters its model has, which of them the folder didn't fill, how many were held against
the folder's tensors and which differ.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import types
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from torch import Tensor

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
OPTIONAL = (".attn.", ".input_scale_ub", ".w13_bias", ".w2_bias")
"""In names of what no folder fills: scales of an unquantized cache, a bound from the config, biases
of experts that have none."""


class _Operators:
    """``torch.ops._C`` without the compiled library: imports ask what it supports."""

    imported = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not (self.imported or "support" in name):
            raise AttributeError(name)

        def stand_in(*_: Any, **__: Any) -> bool:
            return True

        stand_in.default = stand_in  # type: ignore[attr-defined]
        return stand_in


def pretend() -> None:
    """Let vLLM believe that it stands on an H200 with its library in place."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    for name in ("_C_stable_libtorch", "_C", "_moe_C"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    for name in ("vllm_flash_attn", "vllm_flash_attn.flash_attn_interface"):
        sys.modules[f"vllm.{name}"] = MagicMock()
    torch.ops._C, torch.ops._moe_C = _Operators(), _Operators()  # type: ignore[assignment]

    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class Hopper(cuda.NonNvmlCudaPlatform):  # type: ignore[misc]
        device_type = "cpu"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 140 << 30

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            """Nothing: it would choose kernels of the GPU."""

    vllm.platforms._current_platform = Hopper()
    torch.accelerator.empty_cache = lambda: None
    torch.cpu.default_stream = lambda *_: None  # type: ignore[attr-defined]
    import vllm.model_executor.models.registry as registry

    # It inspects models in a process of its own, which knows nothing of the above.
    registry._run_in_subprocess = lambda function: function()


def read(folder: Path) -> dict[str, Any]:
    """Load ``folder`` as ``vllm serve`` would, up to the kernels' own packing."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        dtype="bfloat16",
        allow_deprecated_quantization=True,
    ).create_engine_config()
    with set_current_vllm_config(config):
        _join_group_of_one()
        torch.set_default_dtype(torch.bfloat16)
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        taken: set[str] = set()
        take = model.load_weights

        def load_weights(weights: Any) -> Any:
            taken.update(names := take(weights))
            return names

        model.load_weights = load_weights
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    parameters = dict(model.named_parameters())
    missing = [n for n in parameters if n not in taken and not any(o in n for o in OPTIONAL)]
    same, different = _held(parameters, folder)
    return {
        "quantization": config.model_config.quantization,
        "parameters": len(parameters),
        "missing": missing,
        "same": same,
        "different": different,
    }


def _join_group_of_one() -> None:
    """One process in every group; those of experts are made while a mixture's config is set."""
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    if not torch.distributed.is_initialized():
        store = Path(tempfile.mkdtemp()) / "store"
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    destroy_model_parallel()
    initialize_model_parallel(1, 1)


def _held(parameters: dict[str, Tensor], folder: Path) -> tuple[int, list[str]]:
    """How many parameters are the folder's tensors (parts where vLLM merges); which aren't."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    same, different = 0, []
    for name, parameter in parameters.items():
        parts = _parts(name, tensors)
        # A scalar of each part: vLLM keeps them apart, or one for all.
        if not parts or (len(parts) > 1 and parts[0].ndim < 2):
            continue
        if type(parameter.data) is not Tensor or parameter.shape.numel() == 0:
            continue
        if any(_equal(parameter.data, whole) for whole in _merged(parts)):
            same += 1
        else:
            different.append(name)
    return same, different


def _parts(name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    names = [name]
    for merged, parts in MERGED.items():
        if f".{merged}." in name:
            names = [name.replace(merged, part) for part in parts]
    return [tensors[n] for n in names if n in tensors]


def _merged(parts: list[Tensor]) -> list[Tensor]:
    """The parts along each dimension that they fit along: layouts differ in where the rows lie."""
    if len(parts) == 1:
        return parts
    made = []
    for dim in range(parts[0].ndim):
        rests = {(*p.shape[:dim], *p.shape[dim + 1 :]) for p in parts}
        if len(rests) == 1:
            made.append(torch.cat(parts, dim))
    return made


def _equal(parameter: Tensor, whole: Tensor) -> bool:
    rows = parameter[: whole.shape[0]] if parameter.ndim and whole.ndim else parameter
    if rows.shape != whole.shape:
        return False
    # vLLM pads the vocabulary, and holds scales in the model's dtype.
    return torch.equal(rows, whole.to(rows.dtype))


def main() -> None:
    pretend()
    from vllm.plugins import load_general_plugins

    # Brings everything that asks for compiled operators while it is imported.
    import_module("vllm.model_executor.model_loader.default_loader")
    load_general_plugins()
    torch.ops._C.imported = torch.ops._moe_C.imported = True  # type: ignore[attr-defined]
    for folder in map(Path, sys.argv[1:]):
        try:
            found = read(folder)
        except Exception as error:  # noqa: BLE001  whatever vLLM says is the finding
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[:3]}
        print(json.dumps({"folder": folder.name, **found}), flush=True)


if __name__ == "__main__":
    main()
