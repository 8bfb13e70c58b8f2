"""8-bit products on a GPU agree with the definition of what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantmill.forms import Blocks, Channel, Grouping, PerTensor, ScaledFloat
from quantmill_fp8.native import Product, kind_of, unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("grouping", [PerTensor(), Channel(0), Blocks(128, 128)])
@pytest.mark.parametrize("rows", [1, 3, 16, 300])
@pytest.mark.parametrize("shape", [(256, 512), (1152, 640), (4096, 4096)])
def test_products_are_near(grouping: Grouping, rows: int, shape: tuple[int, int]) -> None:
    kind = kind_of(grouping)
    assert kind is not None
    reason = unavailable(kind, "cuda")
    if reason is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[:, :128] *= 8
    form = ScaledFloat.quantize(weight, torch.float8_e4m3fn, grouping).to("cuda")
    x = torch.randn(rows, shape[1], generator=generator).to("cuda", torch.bfloat16)
    found: Tensor = Product(form)(x)
    wanted = x.float() @ form.dequantize(torch.float32).t()
    assert (found.float() - wanted).norm() < 0.04 * wanted.norm()
