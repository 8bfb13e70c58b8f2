"""Architectures: what llama.cpp and transformers call the same model, one family a class."""

from __future__ import annotations

from typing import Final

from quantmill_gguf.architectures.bloom import Bloom
from quantmill_gguf.architectures.falcon import Falcon
from quantmill_gguf.architectures.family import Config, Family
from quantmill_gguf.architectures.gemma import Gemma, Gemma2, Gemma3
from quantmill_gguf.architectures.gemma4 import Gemma4
from quantmill_gguf.architectures.gpt2 import GPT2
from quantmill_gguf.architectures.gpt_oss import GptOss
from quantmill_gguf.architectures.lfm2 import Lfm2
from quantmill_gguf.architectures.llama import Llama
from quantmill_gguf.architectures.mamba import Mamba
from quantmill_gguf.architectures.minimax import MiniMaxM2
from quantmill_gguf.architectures.nemotron import Nemotron
from quantmill_gguf.architectures.phi3 import Phi3
from quantmill_gguf.architectures.qwen import Qwen2, Qwen2Moe, Qwen3, Qwen3Moe
from quantmill_gguf.architectures.qwen35 import Qwen35, Qwen35Moe
from quantmill_gguf.architectures.stablelm import StableLm
from quantmill_gguf.architectures.starcoder2 import Starcoder2
from quantmill_gguf.architectures.t5 import T5, T5Encoder

__all__ = ["FAMILIES", "by_architecture", "by_config"]

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
    Nemotron(),
    GptOss(),
    MiniMaxM2(),
    Lfm2(),
    Mamba(),
    Gemma4(),
    Qwen35(),
    Qwen35Moe(),
    T5(),
    T5Encoder(),
)
"""Every family that can be loaded and written."""


def by_architecture(name: object) -> Family | None:
    """The family of ``general.architecture``."""
    return next((item for item in FAMILIES if item.arch == name), None)


def by_config(config: Config) -> Family | None:
    """The family of a config of transformers: of its ``model_type``, and of its class where
    several have that."""
    kind = config.get("model_type")
    found = [item for item in FAMILIES if kind in item.model_types]
    classes = config.get("architectures") or ()
    exact = [item for item in found if len(found) > 1 and item.class_of(config) in classes]
    return next(iter([*exact, *found]), None)
