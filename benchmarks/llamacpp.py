"""llama.cpp's libraries, called from Python: block types, tokens, logits.

The structs of libllama come from the ctypes bindings of ``llama-cpp-python`` (its module
``llama_cpp/llama_cpp.py``, of the version that the libraries were built from), which must be
importable: installed, or the folder of its sources on ``PYTHONPATH``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantmill_gguf.types.sizes import BY_NAME


class Ggml:
    """The entry points of libggml-base that are compared with."""

    def __init__(self, bins: Path) -> None:
        self.library = ctypes.CDLL(str(bins / "libggml-base.so"))
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self.library.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, pointer, pointer, long, long, long, pointer)
        ]
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def encode(self, name: str, values: Tensor, importance: Tensor | None = None) -> Tensor:
        """uint8 ``[rows, row bytes]`` of float32 ``[rows, columns]``."""
        info, values = BY_NAME[name], values.contiguous()
        out = torch.zeros(len(values), info.row_bytes(values.shape[1]), dtype=torch.uint8)
        self.library.ggml_quantize_init(info.number)
        address = None if importance is None else importance.data_ptr()
        self.library.ggml_quantize_chunk(
            info.number, values.data_ptr(), out.data_ptr(), 0, *values.shape, address
        )
        return out

    def decoder(self, name: str) -> Any:
        """``fn(raw address, out address, values)``."""
        head, _, tail = name.partition("_")
        tail = tail if tail == "K" else tail.lower()
        function = getattr(self.library, f"dequantize_row_{head.lower()}" + (tail and f"_{tail}"))
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        return function

    def decode(self, name: str, raw: Tensor) -> Tensor:
        """float32 ``[rows, columns]``."""
        info = BY_NAME[name]
        out = torch.empty(len(raw), raw.shape[1] // info.size * info.block)
        self.decoder(name)(raw.contiguous().data_ptr(), out.data_ptr(), out.numel())
        return out


class Llama:
    """libllama, as far as models are compared with it."""

    def __init__(self, bins: Path) -> None:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(bins)
        if "llama_cpp" not in sys.modules:
            # The package itself imports a server; its module of structs needs nothing.
            spec = importlib.util.find_spec("llama_cpp")
            if spec is None or spec.submodule_search_locations is None:
                raise SystemExit("the bindings of llama-cpp-python are not on PYTHONPATH")
            package = types.ModuleType("llama_cpp")
            package.__path__ = list(spec.submodule_search_locations)
            sys.modules["llama_cpp"] = package
        from llama_cpp import llama_cpp

        self.library: Any = llama_cpp
        self.messages: list[str] = []
        """What llama.cpp said while the last file was loaded."""
        self._listen = llama_cpp.llama_log_callback(
            lambda _, text, __: self.messages.append((text or b"").decode("utf-8", "replace"))
        )
        llama_cpp.llama_log_set(self._listen, None)
        llama_cpp.llama_backend_init()

    @contextmanager
    def model(self, file: Path, vocabulary: bool = False) -> Iterator[Any]:
        """A loaded file, or its vocabulary alone."""
        options = self.library.llama_model_default_params()
        options.vocab_only = vocabulary
        options.use_extra_bufts = False
        self.messages.clear()
        model = self.library.llama_model_load_from_file(str(file).encode(), options)
        if not model:
            told = [text for text in self.messages if "error" in text] or self.messages[-3:]
            raise ValueError(f"llama.cpp refuses {file.name}: {' '.join(told).strip()}")
        try:
            yield model
        finally:
            self.library.llama_model_free(model)

    def logits(self, file: Path, ids: list[int], start: list[int] | None = None) -> Tensor:
        """float32 ``[tokens, vocabulary]``; ``start`` are a decoder's tokens where ``ids`` go into
        an encoder."""
        lib = self.library
        with self.model(file) as model:
            options = lib.llama_context_default_params()
            options.n_ctx = options.n_batch = options.n_ubatch = 512
            options.n_threads = options.n_threads_batch = 1
            options.type_k = options.type_v = lib.GGML_TYPE_F32
            options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.embeddings = not lib.llama_model_has_decoder(model)
            context = lib.llama_init_from_model(model, options)
            try:
                if lib.llama_model_has_encoder(model):
                    self._run(lib.llama_encode, context, ids)
                    if options.embeddings:
                        width = lib.llama_model_n_embd(model)
                        rows = [lib.llama_get_embeddings_ith(context, i) for i in range(len(ids))]
                        return torch.tensor([row[:width] for row in rows])
                    ids = start or [lib.llama_model_decoder_start_token(model)]
                self._run(lib.llama_decode, context, ids)
                width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
                found = lib.llama_get_logits(context)
                return torch.tensor(found[: width * len(ids)]).view(len(ids), width)
            finally:
                lib.llama_free(context)

    def _run(self, function: Any, context: Any, ids: list[int]) -> None:
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = 1
        failed = function(context, batch)
        self.library.llama_batch_free(batch)
        if failed:
            raise ValueError(f"llama.cpp computes nothing: {' '.join(self.messages[-3:])}")

    def tokens(self, model: Any, text: str, ends: bool = True, special: bool = True) -> list[int]:
        """Ids of a text; ``ends`` adds what begins and ends every text."""
        vocabulary, raw = self.library.llama_model_get_vocab(model), text.encode()
        room = 2 * len(raw) + 16
        out = (self.library.llama_token * room)()
        count = self.library.llama_tokenize(vocabulary, raw, len(raw), out, room, ends, special)
        return list(out[:count])
