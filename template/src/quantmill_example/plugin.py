"""What this package registers: data, and import strings for all that is code.

quantmill imports this module for every command, even ``quantmill --help``. Import nothing heavy
here: no torch, no pydantic, no library of your method. The conformance suite checks it.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantmill.hookspecs import hookimpl
from quantmill.registrations import Capabilities, ConfigReader, Method, Preset, Validator

# The version of the contract this package was written for. A literal, not quantmill's constant:
# it says what you have read, so it changes only when you have read a newer one.
QUANTMILL_API = 1


@hookimpl
def quantmill_methods() -> Sequence[Method]:
    """The method, and short names for the settings that most people want."""
    return [
        Method(
            name="example",
            summary="Round to nearest, with a scale and a zero point for each group",
            config="quantmill_example.config:ExampleConfig",
            quantizer="quantmill_example.quantizer:ExampleQuantizer",
            codec="quantmill_example.codec:ExampleCodec",
            # No `linear`: the core's own computes with any form, and with any kernel for it. Name
            # a LinearFactory here if your library brings modules that people expect to find.
            quant_methods=("example",),
            # Declare only what is true: the conformance suite tests each of these.
            capabilities=Capabilities(
                on_the_fly=True,
                prequantized=True,
                serialisable=True,
                trainable=True,
                compileable=True,
                dequantizable=True,
                devices=("cpu", "cuda"),
                target_kinds=("linear",),
                bits=(4, 8),
            ),
            presets=(
                # The last number is bits per code: it orders short names by how much they lose.
                Preset("example-4", {"bits": 4}, "4 bits, groups of 64", 4),
                Preset("example-8", {"bits": 8}, "8 bits, groups of 64", 8),
            ),
            # requirements=(Requirement("yourlibrary", ">=1,<2", "what it is for"),),
        )
    ]


@hookimpl
def quantmill_dialects() -> Sequence[ConfigReader]:
    """How checkpoints of this method are recognised: by quant_method in their config.json."""
    return [
        ConfigReader(
            name="example",
            quant_methods=("example",),
            method="example",
            rules="quantmill_example.config:skip_rules",
        )
    ]


@hookimpl
def quantmill_validators() -> Sequence[Validator]:
    """What to look at before anything is loaded."""
    return [Validator("example", "quantmill_example.validate:check", methods=("example",))]
