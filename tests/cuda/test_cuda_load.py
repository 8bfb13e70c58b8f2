"""Loading onto a GPU: peak memory, bytes, agreement with the CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill
from quantmill.testing import write_tiny_llama

pytest.importorskip("quantmill_bnb")
pytest.importorskip("quantmill_transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]

METHODS = ("bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq", "bnb-int8")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "llama"
    return write_tiny_llama(folder, hidden=2048, inner=5632, layers=6, vocab=32000, heads=16)


@pytest.mark.parametrize("method", METHODS)
def test_the_peak_is_the_model_and_two_of_its_tensors(method: str, large: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model: Any = quantmill.load(large, method, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    largest = 32000 * 2048 * 2
    assert peak <= sum(unique.values()) + 2 * largest + (256 << 20)
    assert all(p.is_cuda for p in model.parameters())
    out = model.generate(
        torch.arange(8, device="cuda").reshape(1, 8),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape == (1, 12)


@pytest.mark.parametrize("method", METHODS)
def test_logits_agree_with_the_dequantized_model_and_saving_is_exact(
    method: str, tmp_path: Path
) -> None:
    folder = write_tiny_llama(tmp_path / "float", hidden=256, inner=512)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    model: Any = quantmill.load(folder, method, device="cuda")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        ours = model(input_ids=ids.cuda()).logits.float().cpu()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    reference: Any = quantmill.dequantize(model)
    with torch.inference_mode():
        theirs = reference(input_ids=ids.cuda()).logits.float().cpu()
    # LLM.int8 rounds activations to 8 bits too, which the dequantized model does not.
    bound = 0.06 if method == "bnb-int8" else 0.03
    assert (ours - theirs).norm() / theirs.norm() < bound
    report = quantmill.quantize(folder, tmp_path / "out", method, device="cuda")
    again: Any = quantmill.load(report.folder, device="cuda")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
def test_the_gpu_quantizes_almost_as_the_cpu_does(method: str, tmp_path: Path) -> None:
    """Codes may differ on ties, of which random bf16 weights have some; values hardly."""
    folder = write_tiny_llama(tmp_path / "float", hidden=256, inner=512)
    here: Any = quantmill.dequantize(quantmill.load(folder, method), torch.float32)
    there: Any = quantmill.dequantize(quantmill.load(folder, method, device="cuda"), torch.float32)
    for (name, ours), theirs in zip(
        here.state_dict().items(), there.state_dict().values(), strict=True
    ):
        differing = (ours != theirs.cpu()).float().mean().item()
        assert differing < 0.02, (name, differing)


def test_asking_for_more_than_the_device_has_is_refused_before_loading(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "float")
    with pytest.raises(quantmill.QuantmillError) as caught:
        quantmill.load(folder, "bnb-nf4", device="cuda", max_memory={"cuda": 1000})
    assert any(item.code == "QM-MEMORY-001" for item in caught.value.findings)


def test_qlora_falls_on_the_gpu(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = write_tiny_llama(tmp_path / "float", hidden=128, inner=256)
    base: Any = quantmill.load(folder, "bnb-nf4", device="cuda", training=True)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"])
    model: Any = peft.get_peft_model(base, config)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0)).cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
