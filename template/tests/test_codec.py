"""What is particular to this method: the suite can't know which bits mean what."""

import torch
from quantmill.kernels import KernelRegistry
from quantmill.testing import MatrixSource, make_target

from quantmill_example.codec import ExampleCodec
from quantmill_example.config import ExampleConfig
from quantmill_example.quantizer import ExampleQuantizer


def quantizer(config: ExampleConfig) -> ExampleQuantizer:
    return ExampleQuantizer(config, device=torch.device("cpu"), kernels=KernelRegistry([]))


def test_bytes_are_as_the_layout_says() -> None:
    config = ExampleConfig(bits=4, group_size=8)
    # Steps of 1 from -1 to 14: the zero point is 1, and a code is the weight plus 1.
    weight = torch.tensor([[-1.0, 0, 1, 2, 3, 4, 5, 14]])
    form = quantizer(config).quantize(make_target(1, 8), MatrixSource(weight))
    stored = ExampleCodec(config).encode(form)
    assert stored["weight"].flatten().tolist() == [0x10, 0x32, 0x54, 0xF6]
    assert stored["scales"].tolist() == [[1.0]] and stored["zeros"].tolist() == [[1]]
    assert torch.equal(form.dequantize(), weight)
