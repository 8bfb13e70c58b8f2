"""Registrations of the FP8 backend. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    Capabilities,
    CodecRegistration,
    ConfigReader,
    Method,
    Preset,
    Requirement,
    Validator,
)
from quantmill_fp8.fbgemm import installed, problem, wanted

QUANTMILL_API = 1

_ABLE = Capabilities(
    on_the_fly=True,
    prequantized=True,
    serialisable=True,
    trainable=True,
    compileable=True,
    dequantizable=True,
    devices=("cpu", "cuda"),
    target_kinds=("linear",),
    bits=(8,),
)


def _fbgemm() -> tuple[Requirement, ...]:
    """FBGEMM, where the one that is there goes with another PyTorch; nobody has to have it."""
    found = installed()
    if found is None or problem() is None:
        return ()
    need = wanted()
    if need is None:
        return ()
    why = "the one that goes with this PyTorch multiplies rows on GPUs"
    return (Requirement(found[0], f"=={need}", why, optional=True),)


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="fp8",
            summary="FP8 (E4M3) with a scale per block or per tensor, DeepSeek's layout",
            config="quantmill_fp8.config:Fp8Config",
            quantizer="quantmill_fp8.quantizer:BlockQuantizer",
            codec="quantmill_fp8.codec:BlockCodec",
            linear="quantmill_fp8.linear:FP8LinearFactory",
            quant_methods=("fp8",),
            capabilities=_ABLE,
            presets=(
                Preset(
                    "fp8-block",
                    {"weight_block_size": [128, 128]},
                    "blocks of 128 x 128, float scales",
                    8.002,
                ),
                Preset(
                    "fp8-block-ue8m0",
                    {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
                    "blocks of 128 x 128, scales are powers of two",
                    8.0005,
                ),
                Preset(
                    "fp8-mx",
                    {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
                    "MXFP8: 32 columns share a power of two",
                    8.25,
                ),
                Preset("fp8-tensor", {"weight_block_size": None}, "one scale per weight", 8.0),
            ),
        ),
        Method(
            name="fbgemm-fp8",
            summary="FP8 (E4M3) with a scale per row, FBGEMM's layout",
            config="quantmill_fp8.config:FbgemmFp8Config",
            quantizer="quantmill_fp8.quantizer:RowQuantizer",
            codec="quantmill_fp8.codec:RowCodec",
            linear="quantmill_fp8.linear:FP8LinearFactory",
            quant_methods=("fbgemm_fp8",),
            capabilities=_ABLE,
            presets=(Preset("fp8-row", {}, "one scale per row", 8.01),),
            requirements=_fbgemm(),
        ),
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="fp8",
            quant_methods=("fp8", "mxfp8"),
            method="fp8",
            marker_keys=("weight_block_size",),
            rules="quantmill_fp8.config:rules",
        ),
        ConfigReader(
            name="fbgemm-fp8",
            quant_methods=("fbgemm_fp8",),
            method="fbgemm-fp8",
            marker_keys=("activation_scale_ub",),
            rules="quantmill_fp8.config:rules",
        ),
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [
        CodecRegistration("fp8", "scaled_float", "quantmill_fp8.codec:BlockCodec", "fp8"),
        CodecRegistration(
            "fbgemm-fp8", "scaled_float", "quantmill_fp8.codec:RowCodec", "fbgemm_fp8"
        ),
    ]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    return [Validator("fp8", "quantmill_fp8.validate:check", methods=("fp8", "fbgemm-fp8"))]
