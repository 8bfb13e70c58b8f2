"""Fabricate a float Llama checkpoint of a wanted size, random weights, in shards."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantmill.testing.fabricate import llama_config, llama_shapes

SIZES = {
    "1.1b": {"hidden": 2048, "inner": 5632, "layers": 22, "vocab": 32000, "heads": 32},
    "252m": {"hidden": 1024, "inner": 2816, "layers": 16, "vocab": 32000, "heads": 16},
}


def fabricate(folder: Path, size: str, layers: int | None = None, shards: int = 3) -> Path:
    """Write the checkpoint unless it is there; the key-value heads are an eighth of the others."""
    if (folder / "config.json").exists():
        return folder
    options = dict(SIZES[size])
    if layers is not None:
        options["layers"] = layers
    config = llama_config(**options)  # type: ignore[arg-type]
    config["num_key_value_heads"] = max(1, config["num_attention_heads"] // 8)
    config["max_position_embeddings"] = 2048
    folder.mkdir(parents=True, exist_ok=True)
    shapes = llama_shapes(config)
    names = list(shapes)
    step = -(-len(names) // shards)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    total = 0
    for index in range(shards):
        tensors = {}
        for name in names[index * step : (index + 1) * step]:
            shape = shapes[name]
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                values = torch.randn(shape, generator=generator, dtype=torch.float32)
                tensors[name] = (values * 0.02).to(torch.bfloat16)
            total += tensors[name].numel() * 2
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="1.1b")
    parser.add_argument("--layers", type=int)
    given = parser.parse_args()
    fabricate(given.folder, given.size, given.layers)
