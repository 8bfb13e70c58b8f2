"""Beside transformers and bitsandbytes: what we write they load; what we load PEFT trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantmill

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[2]
NOVELLA = ROOT / "models" / "novella"
PRESETS = ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 4096, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_loads_what_we_write(preset: str, tmp_path: Path, ids: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    quantmill.quantize(NOVELLA, tmp_path / "out", preset)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours: Any = quantmill.load(tmp_path / "out")
    state, again = ours.state_dict(), theirs.state_dict()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name
    with torch.inference_mode():
        assert torch.allclose(
            ours(input_ids=ids).logits.float(), theirs(input_ids=ids).logits.float(), atol=0.05
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_save_pretrained_after_a_forward_writes_exact_scales(
    preset: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    model: Any = quantmill.load(NOVELLA, preset)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        model(input_ids=ids)
    model.save_pretrained(tmp_path / "saved")
    reloaded: Any = quantmill.load(tmp_path / "saved")
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_widths_that_no_block_divides_compute(tmp_path: Path) -> None:
    folder = ROOT / "tests" / "data" / "tiny-ragged"
    model: Any = quantmill.load(folder, "bnb-nf4")
    reference: Any = quantmill.dequantize(quantmill.load(folder, "bnb-nf4"))
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours, theirs = model(input_ids=ids).logits, reference(input_ids=ids).logits
    assert (ours - theirs).float().norm() / theirs.float().norm() < 0.03


def test_qlora_trains_on_a_real_text_without_an_activation(tmp_path: Path) -> None:
    """With double quantization and gradient checkpointing; the adapter reloads."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base: Any = quantmill.load(NOVELLA, "bnb-nf4-dq", training=True)
    assert base.is_gradient_checkpointing
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
    assert kinds == {"Linear4bit"}, "PEFT takes our linears for bitsandbytes' own"
    tokenizer = quantmill.load_tokenizer(NOVELLA)
    text = (NOVELLA / "held.txt").read_text(encoding="utf-8")[:6000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: 8 * 32])
    batch = ids.reshape(8, 32)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for step in range(50):
        rows = batch[(step * 2) % 8 : (step * 2) % 8 + 2]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    fresh = quantmill.load(NOVELLA, "bnb-nf4-dq", training=True)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.inference_mode():
        one, two = model(input_ids=batch[:1]).logits, again(input_ids=batch[:1]).logits
    assert (one - two).float().norm() / one.float().norm() < 0.02
