"""Plain PyTorch modules of any tree: in place, back, saved, loaded again, with little memory."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantmill
from quantmill.findings import QuantmillError
from quantmill.host import default_host

METHODS = sorted(
    next(iter(method.presets)).name
    for method in default_host().methods.values()
    if method.presets and method.capabilities.serialisable
)


class Conv1D(nn.Module):
    """That of GPT-2: the weight is ``[in, out]``."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, out) * 0.05)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(256)
        self.up = nn.Linear(256, 512)
        self.down = nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return result


class Tree(nn.Module):
    """Nested containers, an embedding, a Conv1D, a module at two places, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(512, 256)
        self.blocks = nn.ModuleList([Cell(), Cell()])
        self.parts = nn.ModuleDict({"again": nn.Sequential(nn.Linear(256, 256), nn.GELU())})
        self.conv = Conv1D(256, 256)
        self.twice = self.parts["again"]
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 256)
        self.second.weight = self.first.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        x = self.conv(self.twice(self.parts["again"](x)))
        result: Tensor = self.second(self.first(x))
        return result


IDS = torch.arange(48) % 512


def _tree() -> Tree:
    torch.manual_seed(0)
    tree = Tree()
    for part in tree.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.06)
    with torch.no_grad():
        tree(IDS)  # statistics of the norms
    return tree.eval()


def _quantized(method: str, tree: nn.Module | None = None, **options: Any) -> Any:
    return quantmill.quantize_model(tree or _tree(), method, calibration=[IDS, IDS + 1], **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_tree_is_quantized_saved_loaded_and_becomes_float_again(
    method: str, tmp_path: Path
) -> None:
    with torch.no_grad():
        exact = _tree()(IDS)
        try:
            tree = _quantized(method)
        except QuantmillError as error:
            codes = {item.code for item in error.findings}
            pytest.skip(f"{method} does not take such a module: {codes}")
        kept = tree(IDS)
        assert 0 < float((kept - exact).norm() / exact.norm()) < 0.5
        assert type(tree.blocks[1].up) is not nn.Linear
        assert tree.twice[0] is tree.parts["again"][0] and type(tree.twice[0]) is not nn.Linear
        assert tree.second.weight is tree.first.weight

        quantmill.save(tree, tmp_path / "tree.safetensors")
        with torch.device("meta"):
            empty = Tree()
        again = quantmill.load_into(empty.eval(), tmp_path / "tree.safetensors")
        assert torch.equal(again(IDS), kept)
        assert again.twice[0] is again.parts["again"][0]  # type: ignore[index,union-attr]
        quantmill.save(again, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (
            tmp_path / "tree.safetensors"
        ).read_bytes()

        for found in (tree, again):
            back: Any = quantmill.dequantize_model(found)
            assert [(n, type(m).__name__) for n, m in back.named_modules()] == [
                (n, type(m).__name__) for n, m in _tree().named_modules()
            ]
            assert float((back(IDS) - kept).norm() / kept.norm()) < 0.02
            assert back.twice[0] is back.parts["again"][0]
    assert len(METHODS) > 8


def test_what_stays_float_is_the_same_parameter_and_its_dtype() -> None:
    tree = _tree()
    tree.blocks[0].norm.to(torch.float64)
    tree.conv.bias.requires_grad_(False)
    before = {name: (p, p.dtype, p.requires_grad) for name, p in tree.named_parameters()}
    calls: list[str] = []
    tree.first.register_forward_hook(lambda *_: calls.append("seen"))
    tree.blocks[1].up.register_forward_hook(lambda *_: calls.append("also"))
    quantmill.quantize_model(tree, "bnb-nf4", skip=["blocks.0"])
    after = dict(tree.named_parameters())
    for name in ("blocks.0.up.weight", "blocks.0.norm.weight", "words.weight", "first.weight"):
        parameter, dtype, trained = before[name]
        assert after[name] is parameter
        assert (parameter.dtype, parameter.requires_grad) == (dtype, trained)
    tree.blocks[1](torch.randn(3, 256))
    assert calls == ["also"], "hooks of a replaced module are kept"


def test_several_methods_by_a_dict_and_presets_of_any_backend() -> None:
    tree: Any = _quantized({"method": "bnb-nf4", "assign": {"blocks.1": "fp8-block"}})
    kinds = {type(block.up).__name__ for block in tree.blocks}
    assert len(kinds) == 2


def test_torch_own_transformer_layers_compute_with_quantized_linears() -> None:
    # In eval mode PyTorch reads the weights of its linears directly, if it may.
    torch.manual_seed(0)
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), 2)
    layer.eval()
    x = torch.randn(2, 7, 128)
    mask = torch.arange(7) > torch.tensor([[4], [6]])
    with torch.inference_mode():
        exact, masked = layer(x), layer(x, src_key_padding_mask=mask)
        for method in ("bnb-nf4", "bnb-int8", "gptq-4", "hqq-4", "fp8-row"):
            mine: Any = copy.deepcopy(layer)
            quantmill.quantize_model(mine, method, calibration=[x])
            assert type(mine.layers[0].linear1) is not nn.Linear
            assert 0 < float((mine(x) - exact).norm() / exact.norm()) < 0.2, method
            padded = mine(x, src_key_padding_mask=mask)
            assert 0 < float((padded - masked)[~mask].norm() / masked[~mask].norm()) < 0.2, method
        quantmill.dequantize_model(mine)
        assert mine.layers[0].activation_relu_or_gelu == layer.layers[0].activation_relu_or_gelu


def test_training_prepares_for_adapters() -> None:
    tree = _quantized("bnb-nf4", training=True)
    assert tree.training and not any(p.requires_grad for p in tree.parameters())


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: nn.Linear(64, 64), "QM-MODULE-003"),
        (lambda: nn.Sequential(nn.LazyLinear(64)), "QM-MODULE-001"),
        (lambda: nn.Sequential(nn.Linear(64, 64, device="meta")), "QM-MODULE-001"),
        (lambda: quantmill.quantize_model(_tree(), "bnb-nf4"), "QM-MODULE-002"),
    ],
)
def test_modules_that_can_t_be_quantized_are_refused(make: Any, code: str) -> None:
    with pytest.raises(QuantmillError) as caught:
        quantmill.quantize_model(make(), "bnb-nf4")
    (finding,) = caught.value.findings
    assert finding.code == code and finding.fix


def test_blocks_may_have_names_of_their_own() -> None:
    blocks = {name: nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for name in ("first", "second")}
    model = nn.Sequential(OrderedDict(blocks))
    quantmill.quantize_model(model, "gptq-4:group_size=32", calibration=torch.randn(64, 64))
    assert type(model.second[0]) is not nn.Linear


def test_a_calibration_that_fails_leaves_every_weight(tmp_path: Path) -> None:
    tree = _tree()
    with torch.no_grad():
        tree.blocks[1].up.weight[3, 4] = float("nan")
    with pytest.raises(QuantmillError) as caught:
        _quantized("gptq-4", tree)
    assert caught.value.findings[0].code in ("QM-WEIGHT-001", "QM-CALIB-012")
    assert not any(parameter.is_meta for parameter in tree.parameters())


def test_a_file_of_another_module_is_refused_with_each_difference(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    quantmill.save(_quantized("bnb-nf4"), path)
    other = _tree()
    other.extra = nn.Linear(8, 8)
    other.conv = Conv1D(128, 256)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(QuantmillError) as caught:
        quantmill.load_into(other, path)
    found = {item.where: item.code for item in caught.value.findings}
    assert set(found.values()) == {"QM-MODULE-011"}
    assert {"extra.weight", "extra.bias", "conv.bias"} <= set(found)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    quantmill.save(quantmill.quantize_model(_tree(), "bnb-nf4"), path)
    with pytest.raises(QuantmillError) as caught:
        quantmill.load_into(nn.Sequential(nn.Linear(4, 4)), path)
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(QuantmillError) as caught:
        quantmill.load_into(_tree(), tmp_path / "plain.safetensors")
    assert caught.value.findings[0].code == "QM-MODULE-010"


STREAMS = """
import gc, sys, torch
from torch import nn
import quantmill

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) << 10

small = nn.Sequential(nn.Linear(64, 64))
quantmill.quantize_model(small, sys.argv[1])  # imports
before = resident()
layers = [nn.Linear(2048, 2048, bias=False) for _ in range(16)]
net = nn.Sequential(*layers)
del layers
size = sum(p.nbytes for p in net.parameters())
loaded = resident()
quantmill.quantize_model(net, sys.argv[1])
gc.collect()
print(size, peak() - loaded, resident() - before)
"""


def test_each_weight_is_freed_when_it_is_replaced() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAMS, "bnb-nf4"], capture_output=True, text=True, check=True
    )
    size, above, left = map(int, done.stdout.split())
    assert above < 0.15 * size + (48 << 20), "float and quantized weights were there together"
    assert left < 0.35 * size, "float weights stayed"
