"""What is particular to this method: which byte means what."""

import pytest
import torch
from quantmill.findings import QuantmillError
from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target

from quantmill_ternary.codec import TernaryCodec
from quantmill_ternary.config import TernaryConfig
from quantmill_ternary.form import pack, unpack
from quantmill_ternary.quantizer import TernaryQuantizer


def test_bytes_are_as_the_layout_says() -> None:
    config = TernaryConfig(group_size=8)
    quantizer = TernaryQuantizer(config, device=torch.device("cpu"), kernels=KernelRegistry([]))
    # The mean magnitude is 1.1, so what is below 0.77 becomes zero; the others have a mean of 2.
    weight = torch.tensor([[2.0, -2, 0.1, 0, -0.1, 3, -1, 0.6]])
    form = quantizer.quantize(make_target(1, 8), MatrixSource(weight))
    stored = TernaryCodec(config).encode(form)
    # 2 + 0*3 + 1*9 + 1*27 + 1*81, and 2 + 0*3 + 1*9 with zeros behind.
    assert stored["weight"].tolist() == [[119, 119]]
    assert stored["scales"].tolist() == [[2.0]]
    assert form.dequantize().tolist() == [[2.0, -2, 0, 0, 0, 2, -2, 0]]


def test_every_trit_comes_back() -> None:
    trits = torch.randint(-1, 2, (9, 243), generator=torch.Generator().manual_seed(0))
    for columns in (1, 4, 5, 6, 243):
        assert torch.equal(
            unpack(pack(trits[:, :columns]), columns), trits[:, :columns].to(torch.int8)
        )


def test_bytes_that_are_no_trits_are_refused() -> None:
    codec = TernaryCodec(TernaryConfig())
    stored = {
        "weight": torch.full((2, 13), 243, dtype=torch.uint8),
        "scales": torch.ones(2, 1),
    }
    with pytest.raises(QuantmillError, match="five trits make 242"):
        codec.decode(stored, make_target(2, 64), torch.float32)
