"""What the tests of this package make forms and modules with: no kernels but the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.forms import Form
from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target
from quantmill_bnb.codec import BnbCodec
from quantmill_bnb.config import BnbConfig
from quantmill_bnb.linear import BnbLinearFactory
from quantmill_bnb.quantizer import BnbQuantizer


class Bench:
    """One config and what works with it."""

    def __init__(self, **fields: Any) -> None:
        self.config = BnbConfig.from_user(fields)
        self.codec = BnbCodec(self.config)
        self.kernels = KernelRegistry(())
        cpu = torch.device("cpu")
        self.quantizer = BnbQuantizer(self.config, device=cpu, kernels=self.kernels)
        self.factory = BnbLinearFactory(self.config, self.codec, self.kernels)

    def weight(
        self, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    def form(
        self, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> Form:
        source = MatrixSource(self.weight(shape, dtype, seed), rows=1000)
        return self.quantizer.quantize(make_target(*shape), source)

    def linear(self, form: Form, bias: Tensor | None = None) -> Any:
        rows, columns = form.shape
        module: nn.Module = self.factory.build(
            make_target(rows, columns), form, bias, torch.bfloat16
        )
        return module.eval()


@pytest.fixture
def bench() -> type[Bench]:
    """A bench for a config: ``bench(load_in_8bit=True)``."""
    return Bench
