"""Embeddings held as forms: lookups, subclasses, ties, the way back to float."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantmill.embedding import FormEmbedding, FormWeight, embedding_of
from quantmill.forms import Affine, Form, Group


class Codec:
    """Stores the codes of a form."""

    def encode(self, form: Form) -> dict[str, Tensor]:
        assert isinstance(form, Affine)
        return {"weight.codes": form.codes.data}


class Scaled(nn.Embedding):
    """What Gemma does: rows times a number that no checkpoint stores."""

    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__(rows, width)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        scale: Any = self.scale
        return super().forward(input) * scale.to(self.weight.dtype)


IDS = torch.tensor([[1, 2], [9, 0]])


@pytest.fixture
def form() -> Affine:
    return Affine.quantize(torch.randn(10, 8), 4, Group(4))


@pytest.mark.parametrize("module", [nn.Embedding(10, 8), Scaled(10, 8, 2.0)])
def test_a_lookup_gives_the_rows_of_the_form(module: nn.Embedding, form: Affine) -> None:
    made = embedding_of(module, form, Codec(), torch.float32)  # type: ignore[arg-type]
    scale = 2.0 if isinstance(module, Scaled) else 1.0
    assert isinstance(made, type(module))
    assert torch.equal(made(IDS), form.dequantize()[IDS] * scale)
    assert list(made.state_dict()) == ["weight.codes"] and not list(made.parameters())
    assert torch.equal(copy.deepcopy(made)(IDS), made(IDS))
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDS), made(IDS))
    assert made.to(torch.bfloat16)(IDS).dtype == torch.bfloat16


def test_the_weight_is_made_where_a_value_of_it_is_used(
    form: Affine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FormEmbedding(form, Codec(), torch.bfloat16)  # type: ignore[arg-type]
    calls = []
    original = Affine.dequantize
    monkeypatch.setattr(
        Affine, "dequantize", lambda self, dtype=None: calls.append(1) or original(self, dtype)
    )
    weight = made.weight
    assert isinstance(weight, FormWeight)
    assert (weight.dtype, weight.shape, weight.ndim) == (torch.bfloat16, (10, 8), 2)
    assert weight.device.type == "cpu" and weight.numel() == 80 and not calls
    assert "FormWeight" in repr(weight)
    assert torch.equal(weight + 0, original(form, torch.bfloat16)) and calls


def test_a_tied_embedding_stores_nothing(form: Affine) -> None:
    made = FormEmbedding(form, Codec(), torch.float32, stored=False)  # type: ignore[arg-type]
    assert not made.state_dict()
