"""Registrations of the bitsandbytes backend. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    Capabilities,
    CodecRegistration,
    ConfigReader,
    Finalizer,
    Kernel,
    Method,
    Preset,
    Requirement,
    Validator,
)

QUANTMILL_API = 1

_LIBRARY = Requirement("bitsandbytes", ">=0.46,<1", "its linears compute with the weights")
_NATIVE = Requirement(
    "quantmill-cpu", ">=0.1,<0.2", "quantizes on the CPU 30 times faster", optional=True
)


def _four_bit(kind: str, nested: bool) -> dict[str, object]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="bnb",
            summary="bitsandbytes: NF4, FP4, double quantization (QLoRA) and LLM.int8",
            config="quantmill_bnb.config:BnbConfig",
            quantizer="quantmill_bnb.quantizer:BnbQuantizer",
            codec="quantmill_bnb.codec:BnbCodec",
            linear="quantmill_bnb.linear:BnbLinearFactory",
            quant_methods=("bitsandbytes",),
            aliases=("bitsandbytes",),
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear", "conv1d"),
                bits=(4, 8),
            ),
            presets=(
                Preset("bnb-int8", {"load_in_8bit": True}, "LLM.int8, one scale a row", 8),
                Preset("bnb-nf4", _four_bit("nf4", False), "4-bit normal float, blocks of 64", 4.5),
                Preset("bnb-nf4-dq", _four_bit("nf4", True), "NF4 with 8-bit scales", 4.13),
                Preset("bnb-fp4", _four_bit("fp4", False), "4-bit float, blocks of 64", 4.4),
                Preset("bnb-fp4-dq", _four_bit("fp4", True), "FP4 with 8-bit scales", 4.1),
            ),
            requirements=(_LIBRARY, _NATIVE),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="bitsandbytes",
            quant_methods=("bitsandbytes",),
            method="bnb",
            marker_keys=("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
            rules="quantmill_bnb.config:skip_rules",
        )
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [
        CodecRegistration(
            "bnb-4bit", "codebook", "quantmill_bnb.codec:FourBitCodec", "bitsandbytes"
        ),
        CodecRegistration("bnb-int8", "affine", "quantmill_bnb.codec:Int8Codec", "bitsandbytes"),
    ]


@hookimpl
def quantmill_kernels() -> Sequence[Kernel]:
    return [
        Kernel(
            name="bnb-quantize-4bit-cuda",
            operation="quantize",
            form="codebook",
            implementation="quantmill_bnb.kernels:quantize_4bit",
            device="cuda",
            constraints={
                "bits": (4,),
                "table": ("nf4", "fp4"),
                "grouping": ("flat",),
                "group_size": (32, 64, 128, 256, 512, 1024, 2048, 4096),
            },
            cost=0.1,
            requirements=(_LIBRARY,),
        )
    ]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [Validator("bnb", "quantmill_bnb.validate:check", methods=("bnb",))]


@hookimpl
def quantmill_finalizers() -> Sequence[Finalizer]:
    return [Finalizer("bnb", "quantmill_bnb.finalize:mark_model", methods=("bnb",))]
