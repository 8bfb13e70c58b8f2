"""Perplexity and KL divergence per token, under named protocols.

The reference model's distributions are cached on disk, so that the float model and the quantized
one are never in memory together::

    tokens, bos = tokenize(tokenizer, text)
    spec = ReferenceSpec.of("float-model@revision", tokens, context=512, bos_id=bos)
    reference = cached_reference(spec, tokens, lambda: model_fn_of(load_float_model()))
    result = evaluate_model(load_quantized(), tokenizer, text, context=512, reference=reference)
"""

from quantmill.evaluate.cache import ReferenceCache, cache_folder, cached_reference
from quantmill.evaluate.models import (
    default_context,
    evaluate_model,
    max_positions,
    model_fn_of,
    tokenize,
)
from quantmill.evaluate.protocols import (
    DEFAULT_CONTEXT,
    PROTOCOLS,
    Protocol,
    Window,
    get_protocol,
)
from quantmill.evaluate.reference import ReferenceLogits, ReferenceSpec
from quantmill.evaluate.run import EvalResult, ModelFn, Progress, evaluate
from quantmill.evaluate.storage import Storage
from quantmill.evaluate.writer import ReferenceWriter

__all__ = [
    "DEFAULT_CONTEXT",
    "PROTOCOLS",
    "EvalResult",
    "ModelFn",
    "Progress",
    "Protocol",
    "ReferenceCache",
    "ReferenceLogits",
    "ReferenceSpec",
    "ReferenceWriter",
    "Storage",
    "Window",
    "cache_folder",
    "cached_reference",
    "default_context",
    "evaluate",
    "evaluate_model",
    "get_protocol",
    "max_positions",
    "model_fn_of",
    "tokenize",
]
