"""Promises about modules of no framework."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantmill
from quantmill.findings import QuantmillError
from quantmill.registrations import Capabilities
from quantmill.testing.base import Conformance, normal, off, same

__all__ = ["PlainPromises"]


def _net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128, bias=False))
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return net.to(torch.bfloat16).eval()


class PlainPromises(Conformance):
    """What holds for models of a framework holds for plain PyTorch."""

    def test_a_plain_module_is_quantized_saved_loaded_and_comes_back(
        self, tmp_path: Path, able: Capabilities
    ) -> None:
        if not able.on_the_fly and not able.calibrated:
            pytest.skip("it does not quantize")
        x = normal((32, 128), 7)
        calls = [normal((32, 128), 9)]
        net = quantmill.quantize_model(_net(), self.method, calibration=calls)
        with torch.inference_mode():
            answer = net(x)
            assert type(net[0]) is not nn.Linear  # type: ignore[index]
            with pytest.raises(QuantmillError):
                quantmill.quantize_model(net, self.method, calibration=calls)
            if able.serialisable:
                quantmill.save(net, tmp_path / "net.safetensors")
                again = quantmill.load_into(_net(), tmp_path / "net.safetensors")
                assert same(again.state_dict(), net.state_dict())
                assert torch.equal(again(x), answer)
            if able.dequantizable:
                back = quantmill.dequantize_model(net)
                assert type(back[0]) is nn.Linear  # type: ignore[index]
                assert off(back(x), answer) < self.max_linear_error
