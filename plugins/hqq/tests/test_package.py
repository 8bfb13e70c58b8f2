"""hqq's own ``qmodel.pt``: read as data, never unpickled."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantmill
from quantmill.findings import QuantmillError
from quantmill_hqq.package import read

DATA = Path(__file__).parent / "data" / "hqq-4bit-g64-st"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def modules() -> dict[str, dict[str, Any]]:
    """What hqq's ``save_quantized`` gives to ``torch.save``, of the same weights."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(DATA / "model.safetensors").items():
        module, _, local = name.rpartition(".")
        state = found.setdefault(module, {})
        if local in ("W_q", "scale", "zero", "bias"):
            state[local] = tensor
        elif local == "weight":
            state[local] = torch.nn.Parameter(tensor)
        elif local == "shape":
            state[local] = torch.Size(tensor.tolist())
        elif local in ("nbits", "group_size", "axis"):
            state[local] = int(tensor)
        elif local in ("quant_scale", "quant_zero", "offload_meta", "view_as_float"):
            state[local] = bool(tensor)
    for state in found.values():
        if "W_q" in state:
            state |= {"compute_dtype": torch.bfloat16, "unpack_view_dtype": torch.uint8}
    return found


def folder(path: Path, tree: Any) -> Path:
    path.mkdir(parents=True)
    shutil.copy(DATA / "config.json", path)
    torch.save(tree, path / "qmodel.pt")
    return path


def test_it_is_the_model_of_the_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    ours = quantmill.load(folder(tmp_path / "package", modules())).state_dict()
    theirs = quantmill.load(DATA).state_dict()
    numbers = {name for name in theirs if name.endswith((".W_q", ".scale", ".zero", ".weight"))}
    assert len(numbers) > 20
    for name in numbers:
        assert torch.equal(ours[name], theirs[name]), name


def test_it_is_converted_like_any_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("quantmill_transformers")
    source = folder(tmp_path / "package", modules())
    quantmill.convert(source, tmp_path / "plain", "bf16")
    assert load_file(tmp_path / "plain" / "model.safetensors")[f"{Q_PROJ}.weight"].ndim == 2


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tree: tree[Q_PROJ].update(axis=Harm()), "mkdir"),
        (lambda tree: tree[Q_PROJ].update(scale=tree[Q_PROJ]["scale"][:3]), "scales"),
        (lambda tree: tree[Q_PROJ].update(quant_zero=True), "quantized"),
        (lambda tree: tree[Q_PROJ].update(W_q=tree[Q_PROJ]["W_q"].t()), "one piece"),
        (lambda tree: tree[Q_PROJ].pop("zero"), "no tensor zero"),
        (lambda tree: tree[Q_PROJ].update(axis=2), "axis 2"),
        (lambda tree: tree.update(other=3), "something else"),
    ],
)
def test_what_is_wrong_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = modules()
    change(tree)
    with pytest.raises(QuantmillError, match=word) as caught:
        quantmill.plan(folder(tmp_path / "package", tree))
    assert {item.code for item in caught.value.findings} == {"QM-HQQ-003"}
    assert not Path("harmed").exists()


def test_a_bare_pickle_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "package", modules()) / "qmodel.pt"
    whole = path.read_bytes()
    for data in (pickle.dumps({"a": {}}), b"", whole[: len(whole) // 2], whole[: len(whole) - 9]):
        path.write_bytes(data)
        with pytest.raises(QuantmillError):
            read(path)


def test_no_change_of_its_description_is_more_than_an_error(tmp_path: Path) -> None:
    source = folder(tmp_path / "package", modules()) / "qmodel.pt"
    with zipfile.ZipFile(source) as archive:
        parts = {item.filename: archive.read(item) for item in archive.infolist()}
    name = next(item for item in parts if item.endswith("data.pkl"))
    draw = random.Random(0)
    damaged = tmp_path / "package" / "damaged.pt"
    refused = 0
    for _ in range(200):
        data = bytearray(parts[name])
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with zipfile.ZipFile(damaged, "w") as archive:
            for item, content in parts.items():
                archive.writestr(item, bytes(data) if item == name else content)
        try:
            headers = read(damaged)
        except QuantmillError:
            refused += 1
        else:
            size = damaged.stat().st_size
            assert all(0 <= item.start <= item.stop <= size for item in headers.tensors.values())
    assert refused > 50
