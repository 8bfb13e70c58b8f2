"""The libraries' own quantization of one linear, for the quality table of ``backends.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Quantizer = Callable[[Tensor], Tensor]
"""A library's own rounding: a weight ``[out, in]`` to the float weight that it stands for, or
inputs ``[..., in]`` likewise."""


@dataclass(frozen=True)
class Case:
    """One config, here and there."""

    method: str
    """Ours, as a METHOD."""
    weight: Quantizer
    inputs: Quantizer | None = None
    """Where activations are rounded, each time."""


def torchao(name: str, **fields: Any) -> Quantizer:
    def run(weight: Tensor) -> Tensor:
        import torchao.quantization as ao
        from torchao.core.config import config_from_dict

        from quantmill_torchao.classes import described

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


def torchao_int4(weight: Tensor) -> Tensor:
    """Of ``Int4WeightOnlyConfig``, whose tensors need a GPU: by the functions it is made of."""
    from torchao.quantization import quant_primitives as ao

    block = (1, 128)
    scale, zero = ao._choose_qparams_affine_tinygemm(
        weight, ao.MappingType.ASYMMETRIC, block, torch.int32, 0, 15,
        scale_dtype=weight.dtype, zero_point_dtype=weight.dtype,
    )  # fmt: skip
    codes = ao._quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
    result: Tensor = ao._dequantize_affine_tinygemm(
        codes, block, scale, zero, torch.int32, 0, 15, output_dtype=weight.dtype
    )
    return result


def torchao_inputs(kind: str) -> Quantizer:
    """Per token: symmetric int8, asymmetric int8 or float8."""

    def run(x: Tensor) -> Tensor:
        from torchao.quantization import quant_primitives as ao

        block = (*[1] * (x.dim() - 1), x.shape[-1])
        if kind == "float8":
            scale = ao._choose_scale_float8(x, list(block))
            codes = ao._quantize_affine_float8(x, scale, torch.float8_e4m3fn)
            result: Tensor = ao._dequantize_affine_float8(codes, scale, x.dtype)
            return result
        symmetric = kind == "int8"
        mapping = ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC
        scale, zero = ao.choose_qparams_affine(
            x, mapping, block, torch.int8, -127 if symmetric else -128, 127,
            scale_dtype=torch.float32, zero_point_dtype=torch.int8,
        )  # fmt: skip
        codes = ao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127)
        return ao.dequantize_affine(
            codes, block, scale, zero, torch.int8, -128, 127, output_dtype=x.dtype
        )

    return run


def compressed_inputs(**fields: Any) -> Quantizer:
    def run(x: Tensor) -> Tensor:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

        args = QuantizationArgs(strategy="token", dynamic=True, **fields)
        scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Identity())
        result: Tensor = fake_quantize(x, scale, zero, args)
        return result

    return run


_FP4 = {"num_bits": 4, "type": "float"}
_FP8 = {"num_bits": 8, "type": "float"}
_POWERS = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
_INTX = "IntxWeightOnlyConfig"


def _intx(bits: int, size: int, mapping: str = "SYMMETRIC") -> Case:
    fields = {"granularity": f"PerGroup({size})", "mapping_type": mapping}
    method = ",".join(f"{key}={value}" for key, value in fields.items())
    return Case(
        f"torchao:quant_type={_INTX},weight_dtype=int{bits},{method}",
        torchao(_INTX, weight_dtype=f"int{bits}", **fields),
    )


def _grouped(bits: int, size: int, symmetric: bool = True) -> Case:
    asymmetric = "" if symmetric else ",symmetric=false"
    return Case(
        f"ct:num_bits={bits},group_size={size},strategy=group{asymmetric}",
        compressed(num_bits=bits, strategy="group", group_size=size, symmetric=symmetric),
    )


CASES: dict[str, Case] = {
    "fp8 blocks 64x64": Case("fp8-block:weight_block_size=[64,64]", fp8_blocks("float")),
    "fp8 blocks 64x64 ue8m0": Case(
        "fp8-block-ue8m0:weight_block_size=[64,64]", fp8_blocks("ue8m0")
    ),
    "fp8 rows": Case("fp8-row", compressed(**_FP8, strategy="channel")),
    "fp8 tensor": Case("fp8-tensor", compressed(**_FP8, strategy="tensor")),
    "fp8 mx": Case("fp8-mx", compressed(**_FP8, strategy="group", group_size=32, **_POWERS)),
    "torchao int4 g128": Case("torchao-int4wo", torchao_int4),
    "torchao int8": Case("torchao-int8wo", torchao("Int8WeightOnlyConfig")),
    "torchao int8 tensor": Case(
        "torchao-int8wo:granularity=PerTensor",
        torchao("Int8WeightOnlyConfig", granularity="PerTensor"),
    ),
    "torchao int8 g64": Case(
        "torchao-int8wo:granularity=PerGroup(64)",
        torchao("Int8WeightOnlyConfig", granularity="PerGroup(64)"),
    ),
    "torchao float8": Case("torchao-float8wo", torchao("Float8WeightOnlyConfig")),
    "torchao float8 tensor": Case(
        "torchao-float8wo:granularity=PerTensor",
        torchao("Float8WeightOnlyConfig", granularity="PerTensor"),
    ),
    "torchao intx 8-bit": Case(f"torchao:quant_type={_INTX}", torchao(_INTX)),
    "torchao intx 4-bit g64": _intx(4, 64),
    "torchao intx 4-bit g64 asym": _intx(4, 64, "ASYMMETRIC"),
    "torchao intx 3-bit g32": _intx(3, 32),
    "torchao intx 2-bit g32 asym": _intx(2, 32, "ASYMMETRIC"),
    "torchao int8 dynamic": Case(
        "torchao-int8da-int8w",
        torchao("Int8DynamicActivationInt8WeightConfig"),
        torchao_inputs("int8"),
    ),
    "torchao int4, int8 dynamic": Case(
        "torchao-int8da-int4w",
        torchao(
            "Int8DynamicActivationIntxWeightConfig",
            weight_dtype="int4",
            weight_granularity="PerGroup(32)",
        ),
        torchao_inputs("int8 asymmetric"),
    ),
    "torchao float8 dynamic": Case(
        "torchao-float8da-float8w:granularity=PerRow",
        torchao("Float8WeightOnlyConfig"),
        torchao_inputs("float8"),
    ),
    "hqq 8-bit": Case("hqq-8", hqq(8)),
    "hqq 4-bit": Case("hqq-4", hqq(4)),
    "hqq 4-bit axis 0": Case("hqq-4:axis=0", hqq(4, 0)),
    "hqq 3-bit": Case("hqq-3", hqq(3)),
    "hqq 2-bit": Case("hqq-2", hqq(2)),
    "hqq 1-bit": Case("hqq:nbits=1", hqq(1)),
    "quanto int8": Case("quanto-int8", quanto("qint8")),
    "quanto float8": Case("quanto-float8", quanto("qfloat8_e4m3fn")),
    "quanto float8 e5m2": Case("quanto:weights=float8_e5m2", quanto("qfloat8_e5m2")),
    "quanto int4": Case("quanto-int4", quanto("qint4")),
    "quanto int2": Case("quanto-int2", quanto("qint2")),
    "ct w8a16": Case("ct-int8", compressed(num_bits=8, strategy="channel")),
    "ct w8a16 g128": _grouped(8, 128),
    "ct w4a16": Case("ct-int4", compressed(num_bits=4, strategy="group", group_size=128)),
    "ct w4a16 g64": _grouped(4, 64),
    "ct w4a16 g64 asym": _grouped(4, 64, symmetric=False),
    "ct w3a16 g64": _grouped(3, 64),
    "ct w2a16 g32": _grouped(2, 32),
    "ct w8a8": Case(
        "ct-int8-dynamic",
        compressed(num_bits=8, strategy="channel"),
        compressed_inputs(num_bits=8),
    ),
    "ct fp8": Case("ct-fp8", compressed(**_FP8, strategy="channel")),
    "ct fp8 dynamic": Case(
        "ct-fp8-dynamic", compressed(**_FP8, strategy="channel"), compressed_inputs(**_FP8)
    ),
    "ct fp8 blocks 64x64": Case(
        "ct-fp8:strategy=block,block_structure=[64,64]",
        compressed(**_FP8, strategy="block", block_structure=[64, 64]),
    ),
    "ct nvfp4": Case(
        "ct-nvfp4",
        compressed(
            **_FP4,
            strategy="tensor_group",
            group_size=16,
            scale_dtype=torch.float8_e4m3fn,
            zp_dtype=torch.float8_e4m3fn,
        ),
    ),
    "ct mxfp4": Case("ct-mxfp4", compressed(**_FP4, strategy="group", group_size=32, **_POWERS)),
    "ct mxfp8": Case("ct-mxfp8", compressed(**_FP8, strategy="group", group_size=32, **_POWERS)),
}
