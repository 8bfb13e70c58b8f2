"""llama.cpp's own product of a quantized matrix with activations, called from Python."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantmill_gguf.types.sizes import BY_NAME

_F32 = 0


class _Params(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("size", ctypes.c_size_t),
        ("memory", ctypes.c_void_p),
        ("without_data", ctypes.c_bool),
    ]


class GgmlMatmul:
    """One graph with a product for each of many copies of a weight: threads are started once for
    all of them, and each copy is cold."""

    def __init__(self, bins: Path, type_name: str, rows: Tensor, columns: int, copies: int) -> None:
        """``rows`` are uint8 ``[rows, row bytes]``."""
        self._base = ctypes.CDLL(str(bins / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(bins / "libggml-cpu.so"))
        pointer, size, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        for library, name, result, arguments in (
            (self._base, "ggml_init", pointer, [_Params]),
            (self._base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, long, long]),
            (self._base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            (self._base, "ggml_new_graph", pointer, [pointer]),
            (self._base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (self._base, "ggml_backend_cpu_buffer_from_ptr", pointer, [pointer, size]),
            (self._base, "ggml_backend_tensor_alloc", ctypes.c_int, [pointer, pointer, pointer]),
            (self._base, "ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
            (self._cpu, "ggml_backend_cpu_init", pointer, []),
            (self._cpu, "ggml_backend_cpu_set_n_threads", None, [pointer, ctypes.c_int]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._number, self._columns = BY_NAME[type_name].number, columns
        self._weights = [rows.clone() for _ in range(copies)]
        self._backend = self._cpu.ggml_backend_cpu_init()
        self._graphs: dict[int, tuple[int, Tensor]] = {}
        self._kept: list[Tensor] = []

    def _placed(self, tensor: int, data: Tensor) -> int:
        """A tensor of a graph with memory of ours, which must begin at a multiple of 32 bytes."""
        count = data.numel() * data.element_size()
        buffer = self._base.ggml_backend_cpu_buffer_from_ptr(data.data_ptr(), count)
        self._base.ggml_backend_tensor_alloc(buffer, tensor, data.data_ptr())
        self._kept.append(data)
        return tensor

    def _graph(self, batch: int) -> tuple[int, Tensor]:
        if batch not in self._graphs:
            base, rows = self._base, len(self._weights[0])
            context = base.ggml_init(_Params(1 << 22, None, True))
            x = base.ggml_new_tensor_2d(context, _F32, self._columns, batch)
            self._placed(x, torch.randn(batch, self._columns))
            graph, y = base.ggml_new_graph(context), torch.empty(batch, rows)
            for weight in self._weights:
                made = base.ggml_new_tensor_2d(context, self._number, self._columns, rows)
                product = base.ggml_mul_mat(context, self._placed(made, weight), x)
                base.ggml_build_forward_expand(graph, self._placed(product, y))
            self._graphs[batch] = graph, self._kept[-1]
        return self._graphs[batch]

    def seconds(self, batch: int, threads: int) -> float:
        """Of one product, on average over all copies."""
        graph, _ = self._graph(batch)
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, threads)
        start = time.perf_counter()
        failed = self._base.ggml_backend_graph_compute(self._backend, graph)
        if failed:
            raise RuntimeError(f"llama.cpp's graph failed with {failed}")
        return (time.perf_counter() - start) / len(self._weights)
