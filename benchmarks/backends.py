"""FP8, torchao, HQQ, Quanto and compressed-tensors beside the libraries that own the formats.

    python benchmarks/backends.py kl [--windows 40] [--only NAME ...] [--json]
    python benchmarks/backends.py load WORK [--only NAME ...] [--peer] [--rounds 1] [--json]

``kl``: the same model (``models/novella``) and the same config; each library quantizes every linear
of the blocks itself, and both results are judged as float weights: only quantization counts,
mean KL per token to the float model over held-out windows. ``load``: a fabricated Llama of 1.1B
parameters, quantized while loading; seconds and peak memory after the imports, each run in a
process of its own, beside transformers where it can (HQQ: its own library).
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from calibrated import MODEL, compared, divergences, log_probabilities, windows
from fabricate import fabricate
from torch import Tensor, nn

import quantmill

Quantizer = Callable[[Tensor], Tensor]
"""A library's own rounding: a weight ``[out, in]`` to the float weight that it stands for."""


def torchao(name: str, **fields: Any) -> Quantizer:
    def run(weight: Tensor) -> Tensor:
        import torchao.quantization as ao
        from torchao.core.config import config_from_dict

        from quantmill_torchao.recipes import described

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight.clone()
        ao.quantize_(layer, config_from_dict(described(name, fields)))
        made: Any = layer.weight
        result: Tensor = made.dequantize()
        return result

    return run


def hqq(bits: int, axis: int = 1) -> Quantizer:
    def run(weight: Tensor) -> Tensor:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight.clone()
        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
        made = HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu")
        result: Tensor = made.dequantize()
        return result.reshape(weight.shape)

    return run


def quanto(name: str) -> Quantizer:
    def run(weight: Tensor) -> Tensor:
        from optimum import quanto as library

        model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        model[0].weight = nn.Parameter(weight.clone())
        library.quantize(model, weights=getattr(library, name))
        library.freeze(model)
        made: Any = model[0].weight
        result: Tensor = made.dequantize()
        return result

    return run


def compressed(**fields: Any) -> Quantizer:
    def run(weight: Tensor) -> Tensor:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        args = QuantizationArgs(**fields)
        rows, columns = weight.shape
        tall, wide = args.block_structure or (1, args.group_size or columns)
        tiles = weight.reshape(rows // tall, tall, columns // wide, wide)
        low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
        whole = generate_gparam(low.min(), high.max()) if args.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        result: Tensor = fake_quantize(weight, scale, zero, args, global_scale=whole)
        return result

    return run


def fp8_blocks(scales: str) -> Quantizer:
    def run(weight: Tensor) -> Tensor:
        from transformers import FineGrainedFP8Config
        from transformers.integrations.finegrained_fp8 import Fp8Quantize

        config = FineGrainedFP8Config(weight_block_size=(64, 64), scale_fmt=scales)
        made: Any = Fp8Quantize(SimpleNamespace(quantization_config=config))
        found = made.convert({"a.weight": weight})
        scale = found["a.weight_scale_inv"].float()
        wide = scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
        result: Tensor = found["a.weight"].float() * wide
        return result

    return run


_FP4 = {"num_bits": 4, "type": "float"}
CASES: dict[str, tuple[str, Quantizer]] = {
    "fp8 blocks 64x64": ("fp8-block:weight_block_size=[64,64]", fp8_blocks("float")),
    "fp8 blocks 64x64 ue8m0": ("fp8-block-ue8m0:weight_block_size=[64,64]", fp8_blocks("ue8m0")),
    "fp8 rows": ("fp8-row", compressed(num_bits=8, type="float", strategy="channel")),
    "torchao int8": ("torchao-int8wo", torchao("Int8WeightOnlyConfig")),
    "torchao float8": ("torchao-float8wo", torchao("Float8WeightOnlyConfig")),
    "torchao intx 4-bit g64": (
        "torchao-intx4wo:granularity=PerGroup(64)",
        torchao("IntxWeightOnlyConfig", weight_dtype="int4", granularity="PerGroup(64)"),
    ),
    "torchao intx 4-bit g64 asym": (
        "torchao-intx4wo:granularity=PerGroup(64),mapping_type=ASYMMETRIC",
        torchao(
            "IntxWeightOnlyConfig",
            weight_dtype="int4",
            granularity="PerGroup(64)",
            mapping_type="ASYMMETRIC",
        ),
    ),
    "hqq 8-bit": ("hqq-8", hqq(8)),
    "hqq 4-bit": ("hqq-4", hqq(4)),
    "hqq 4-bit axis 0": ("hqq-4:axis=0", hqq(4, 0)),
    "hqq 3-bit": ("hqq-3", hqq(3)),
    "hqq 2-bit": ("hqq-2", hqq(2)),
    "quanto int8": ("quanto-int8", quanto("qint8")),
    "quanto float8": ("quanto-float8", quanto("qfloat8_e4m3fn")),
    "quanto int4": ("quanto-int4", quanto("qint4")),
    "quanto int2": ("quanto-int2", quanto("qint2")),
    "ct int8": ("ct-int8", compressed(num_bits=8, strategy="channel")),
    "ct int4 g64": (
        "ct-int4:group_size=64",
        compressed(num_bits=4, strategy="group", group_size=64),
    ),
    "ct int4 g64 asym": (
        "ct-int4-asym:group_size=64",
        compressed(num_bits=4, strategy="group", group_size=64, symmetric=False),
    ),
    "ct fp8": ("ct-fp8", compressed(num_bits=8, type="float", strategy="channel")),
    "ct fp8 blocks 64x64": (
        "ct-fp8:strategy=block,block_structure=[64,64]",
        compressed(num_bits=8, type="float", strategy="block", block_structure=[64, 64]),
    ),
    "ct nvfp4": (
        "ct-nvfp4",
        compressed(
            **_FP4,
            strategy="tensor_group",
            group_size=16,
            scale_dtype=torch.float8_e4m3fn,
            zp_dtype=torch.float8_e4m3fn,
        ),
    ),
    "ct mxfp4": (
        "ct-mxfp4",
        compressed(
            **_FP4, strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8
        ),
    ),
}
"""Name to our METHOD and the library's own."""


def peer_model(run: Quantizer) -> Any:
    """The model with the library's weights."""
    model: Any = quantmill.load(MODEL)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            with torch.no_grad():
                module.weight = nn.Parameter(run(module.weight.detach()).to(torch.bfloat16))
    return model


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    held = windows(options.windows, 512, "held.txt")
    model: Any = quantmill.load(MODEL)
    reference = [log_probabilities(model, row.unsqueeze(0))[0] for row in held]
    results = []
    for name in options.only or CASES:
        method, run = CASES[name]
        ours = divergences(quantmill.load(MODEL, method, dequantize=True), held, reference)
        row: dict[str, Any] = {"case": name, "method": method, "kl": ours.mean().item()}
        try:
            theirs = divergences(peer_model(run), held, reference)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            row["peer"] = f"{type(error).__name__}: {str(error)[:80]}"
        else:
            row |= compared(ours, theirs)
        gc.collect()
        results.append(row)
        if not options.json:
            peer = row.get("peer", "")
            if "ratio" in row:
                low, high = row["ratio_95"]
                peer = f"{row['peer_kl']:.6f}   ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
            print(f"{name:28} KL {row['kl']:.6f}   library {peer}", flush=True)
    return results


LOADS: dict[str, str] = {
    "torchao-int8wo": "TorchAoConfig(q.Int8WeightOnlyConfig())",
    "torchao-float8wo": "TorchAoConfig(q.Float8WeightOnlyConfig())",
    "torchao-intx4wo": "TorchAoConfig(q.IntxWeightOnlyConfig(weight_dtype=torch.int4,"
    " granularity=q.PerGroup(128)))",
    "quanto-int8": "QuantoConfig(weights='int8')",
    "quanto-float8": "QuantoConfig(weights='float8')",
    "quanto-int4": "QuantoConfig(weights='int4')",
    "hqq-4": "hqq",
    "fp8-block": "",
    "fp8-row": "",
    "ct-int8": "",
    "ct-int4": "",
    "ct-fp8": "",
    "ct-nvfp4": "",
}
"""METHOD to transformers' config, the library's name, or nothing: neither quantizes so here."""

CHILD = r"""
import json, sys, time
folder, method, peer = sys.argv[1:4]
import torch, transformers, quantmill, quantmill.api
import quantmill.checkpoint.reader, quantmill.stages.quantize, quantmill.stages.replace
import quantmill_transformers.architecture, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
if peer:
    from transformers import QuantoConfig, TorchAoConfig
    import torchao.quantization as q
    from optimum import quanto
    from hqq.models.hf.base import AutoHQQHFModel
    from hqq.core.quantize import BaseQuantizeConfig
else:
    from quantmill.host import default_host
    from quantmill.registrations import resolve
    from quantmill.stages.select import parse_method
    found = default_host().methods[parse_method(method, default_host()).method]
    for name in (found.config, found.codec, found.quantizer, found.linear):
        resolve(name)
from quantmill.testing.memory import PeakMemory
torch.set_num_threads(2)

with PeakMemory() as memory:
    start = time.perf_counter()
    if not peer:
        model = quantmill.load(folder, method)
    elif peer == "hqq":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        AutoHQQHFModel.quantize_model(
            model, quant_config=BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
            compute_dtype=torch.bfloat16, device="cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=eval(peer), device_map="cpu")
    seconds = time.perf_counter() - start
size = 0
if not peer:
    plan = model.quantmill_job.plan
    size = plan.totals["bytes_memory"]
print(json.dumps({"seconds": seconds, "peak": memory.bytes, "model": size}))
"""


def measure(folder: Path, method: str, peer: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), method, peer],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:160]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def loads(options: argparse.Namespace) -> list[dict[str, Any]]:
    source = fabricate(options.work / "llama-1.1b", "1.1b")
    results = []
    for method in options.only or LOADS:
        ours = [measure(source, method, "") for _ in range(options.rounds)]
        best = min(ours, key=lambda run: run.get("seconds", float("inf")))
        row: dict[str, Any] = {"method": method, **best}
        if "error" not in best:
            row["of_bound"] = best["peak"] / (1.15 * best["model"] + (64 << 20))
        if options.peer and LOADS[method]:
            theirs = measure(source, method, LOADS[method])
            row["peer"] = theirs
            if "seconds" in theirs and "seconds" in best:
                row["ratio"] = best["seconds"] / theirs["seconds"]
        results.append(row)
        if not options.json:
            print(json.dumps(row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kl = commands.add_parser("kl")
    kl.add_argument("--windows", type=int, default=40)
    load = commands.add_parser("load")
    load.add_argument("work", type=Path)
    load.add_argument("--peer", action="store_true")
    load.add_argument("--rounds", type=int, default=1)
    for part in (kl, load):
        part.add_argument("--only", nargs="*", default=[])
        part.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = table(options) if options.command == "kl" else loads(options)
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
