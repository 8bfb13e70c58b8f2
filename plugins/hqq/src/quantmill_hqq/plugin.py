"""Registrations of the HQQ backend. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import hookimpl
from quantmill.registrations import (
    Capabilities,
    CodecRegistration,
    ConfigReader,
    Container,
    Method,
    Preset,
)

QUANTMILL_API = 1


def _preset(bits: int, stored: float) -> Preset:
    options = {"nbits": bits, "group_size": 64, "axis": 1}
    return Preset(f"hqq-{bits}", options, f"{bits} bits, groups of 64", stored)


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    return [
        Method(
            name="hqq",
            summary="HQQ: affine groups of 1 to 8 bits, optimised without calibration data",
            config="quantmill_hqq.config:HqqConfig",
            quantizer="quantmill_hqq.quantizer:HqqQuantizer",
            codec="quantmill_hqq.codec:HqqCodec",
            linear="quantmill_hqq.linear:HQQLinearFactory",
            quant_methods=("hqq",),
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(1, 2, 3, 4, 8),
            ),
            # Two 16-bit numbers per group of 64; 3 bits lie ten to an int32.
            presets=(_preset(8, 8.5), _preset(4, 4.5), _preset(3, 3.7), _preset(2, 2.5)),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    return [
        ConfigReader(
            name="hqq",
            quant_methods=("hqq",),
            method="hqq",
            marker_keys=("quant_config", "nbits"),
            rules="quantmill_hqq.config:rules",
            # hqq's own files have no quantization_config: their tensors tell.
            detect="quantmill_hqq.detect:detect",
            signs=(".W_q",),
        )
    ]


@hookimpl
def quantmill_containers() -> Sequence[Container]:
    return [
        Container(
            name="hqq-package",
            suffixes=("qmodel.pt",),
            read="quantmill_hqq.package:read",
            in_folder=("qmodel.pt",),
        )
    ]


@hookimpl
def quantmill_codecs() -> Sequence[CodecRegistration]:
    return [CodecRegistration("hqq", "affine", "quantmill_hqq.codec:HqqCodec", "hqq")]
