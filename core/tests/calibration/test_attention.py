"""Which calls of attention go to a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantmill.calibration.attention import KernelAttention
from quantmill.kernels import KernelRegistry
from quantmill.registrations import Kernel

CALLS: list[tuple[float, bool]] = []
PLAIN = functional.scaled_dot_product_attention


def attend(*args: Any, **options: Any) -> Tensor:
    """As a framework does: the function is looked up at each call."""
    return functional.scaled_dot_product_attention(*args, **options)


def kernel(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> Tensor:
    CALLS.append((scale, causal))
    return PLAIN(q, k, v, scale=scale, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


@pytest.fixture
def mode() -> KernelAttention:
    CALLS.clear()
    return KernelAttention(
        KernelRegistry(
            [
                Kernel(
                    name="here",
                    operation="attention",
                    form="tensor",
                    implementation=f"{__name__}:kernel",
                    dtypes=("bfloat16",),
                    cost=0.1,
                )
            ]
        )
    )


def made(heads: int = 4, dim: int = 16, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, heads, 6, dim).to(dtype)


TAKEN: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"scale": 0.5},
    {"k": made(2), "v": made(2), "enable_gqa": True},
    {"v": made(4, 24)},
]


@pytest.mark.parametrize("options", TAKEN)
def test_a_kernel_computes_the_same(mode: KernelAttention, options: dict[str, Any]) -> None:
    options = dict(options)
    q, k, v = made(), options.pop("k", made()), options.pop("v", made())
    wanted = attend(q, k, v, **options)
    with mode:
        found = attend(q, k, v, **options)
    assert torch.equal(found, wanted)
    assert [(options.get("scale", 0.25), options.get("is_causal", False))] == CALLS


LEFT: list[dict[str, Any]] = [
    {"attn_mask": torch.ones(6, 6, dtype=torch.bool)},
    {
        "q": made(dtype=torch.float32),
        "k": made(dtype=torch.float32),
        "v": made(dtype=torch.float32),
    },
    {"q": made().requires_grad_()},
    {"q": made(dim=15), "k": made(dim=15)},
    {"q": made()[0], "k": made()[0], "v": made()[0]},
]


@pytest.mark.parametrize("options", LEFT)
def test_other_calls_are_torchs(mode: KernelAttention, options: dict[str, Any]) -> None:
    options = dict(options)
    q, k, v = (options.pop(name, made()) for name in "qkv")
    with mode:
        found = attend(q, k, v, **options)
    assert torch.equal(found, attend(q, k, v, **options)) and not CALLS


def test_torchs_own_is_back_afterwards(mode: KernelAttention) -> None:
    with mode, mode:
        assert functional.scaled_dot_product_attention is not PLAIN
    assert functional.scaled_dot_product_attention is PLAIN
    with pytest.raises(TypeError), mode:
        functional.scaled_dot_product_attention()
    assert functional.scaled_dot_product_attention is PLAIN
