"""Architectures: what llama.cpp and transformers call the same model, one family a class."""

from __future__ import annotations

from typing import Final

from quantmill_gguf.architectures.bloom import Bloom
from quantmill_gguf.architectures.falcon import Falcon
from quantmill_gguf.architectures.family import Family
from quantmill_gguf.architectures.gemma import Gemma, Gemma2, Gemma3
from quantmill_gguf.architectures.gpt2 import GPT2
from quantmill_gguf.architectures.llama import Llama
from quantmill_gguf.architectures.phi3 import Phi3
from quantmill_gguf.architectures.qwen import Qwen2, Qwen2Moe, Qwen3, Qwen3Moe
from quantmill_gguf.architectures.stablelm import StableLm
from quantmill_gguf.architectures.starcoder2 import Starcoder2

__all__ = ["FAMILIES", "by_architecture", "by_model_type"]

FAMILIES: Final[tuple[Family, ...]] = (
    Llama(),
    Qwen2(),
    Qwen2Moe(),
    Qwen3(),
    Qwen3Moe(),
    Gemma(),
    Gemma2(),
    Gemma3(),
    Phi3(),
    GPT2(),
    Starcoder2(),
    Falcon(),
    StableLm(),
    Bloom(),
)
"""Every family that can be loaded and written."""


def by_architecture(name: object) -> Family | None:
    """The family of ``general.architecture``."""
    return next((item for item in FAMILIES if item.arch == name), None)


def by_model_type(name: object) -> Family | None:
    """The family of transformers' ``model_type``."""
    return next((item for item in FAMILIES if name in item.model_types), None)
