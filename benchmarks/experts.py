"""Experts of a mixture: one product for all, one by one, and transformers' own.

    python benchmarks/experts.py                         both shapes, 1 and 64 tokens
    python benchmarks/experts.py qwen3-moe --tokens 1 --method hqq-4 --json out.json
    python benchmarks/experts.py qwen3-moe --device cuda --tokens 1 16 64 512

One layer's experts, quantized (``--method``, bnb-nf4). In each round these take turns, each with
tokens and random routes of its own: all experts at once, a call for each, and the bf16 experts of
transformers with each of its implementations (``eager``, ``grouped_mm``). Shown are the lower
quartiles over the rounds, in milliseconds, and ratios of these.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import quantmill
from quantmill.experts import LinearExperts

SHAPES: dict[str, tuple[type[nn.Module], Any, int]] = {
    # Mixtral 8x7B with experts of a quarter of their width.
    "mixtral": (
        MixtralExperts,
        MixtralConfig(hidden_size=4096, intermediate_size=3584, num_local_experts=8),
        2,
    ),
    # Qwen3-30B-A3B with half of its experts.
    "qwen3-moe": (
        Qwen3MoeExperts,
        Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=64),
        8,
    ),
}
IMPLEMENTATIONS = ("eager", "grouped_mm")


def float_experts(name: str) -> tuple[Any, Any, int]:
    cls, config, chosen = SHAPES[name]
    config.num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    config._experts_implementation = "eager"
    made: Any = cls(config)  # type: ignore[call-arg]
    made = made.to(torch.bfloat16).requires_grad_(False).eval()
    for parameter in made.parameters():
        parameter.uniform_(-0.03, 0.03)
    return made, config, chosen


def routes(tokens: int, experts: int, chosen: int, device: str) -> tuple[Tensor, Tensor]:
    index = torch.rand(tokens, experts, device=device).topk(chosen).indices
    weights = torch.full((tokens, chosen), 1.0 / chosen, dtype=torch.bfloat16, device=device)
    return index, weights


def timed(function: Callable[[], Any], device: str) -> float:
    def settle() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    settle()
    start = time.perf_counter()
    function()
    settle()
    return 1000.0 * (time.perf_counter() - start)


def quartile(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]


def measure(
    name: str, method: str, batches: list[int], rounds: int, device: str
) -> list[dict[str, Any]]:
    theirs, config, chosen = float_experts(name)
    theirs = theirs.to(device)
    holder = nn.Sequential(nn.ModuleDict({"experts": theirs}))
    ours: Any = quantmill.quantize_model(copy.deepcopy(holder), method, device=device)[0]["experts"]  # type: ignore[index]
    assert isinstance(ours, LinearExperts) and ours._banks, "no kernel takes them all at once"
    banks = ours._banks

    def quantized(grouped: bool, *arguments: Tensor) -> Tensor:
        ours._banks = banks if grouped else ()
        result: Tensor = ours(*arguments)
        return result

    def float_ones(implementation: str, *arguments: Tensor) -> Tensor:
        config._experts_implementation = implementation
        result: Tensor = theirs(*arguments)
        return result

    ways: dict[str, Callable[..., Tensor]] = {
        "at once": lambda *given: quantized(True, *given),
        "one by one": lambda *given: quantized(False, *given),
    }
    for implementation in IMPLEMENTATIONS:
        ways[f"bf16 {implementation}"] = lambda *given, how=implementation: float_ones(how, *given)
    rows = []
    for tokens in batches:
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            first = turn % len(ways)  # What ran before leaves the caches in its state.
            for way, run in [*ways.items()][first:] + [*ways.items()][:first]:
                shape = (tokens, config.hidden_size)
                state = torch.randn(shape, dtype=torch.bfloat16, device=device)
                given = (state, *routes(tokens, config.num_experts, chosen, device))
                spent = timed(functools.partial(run, *given), device)
                if turn:
                    times[way].append(spent)
        found = {way: quartile(spent) for way, spent in times.items()}
        best = min(found[f"bf16 {item}"] for item in IMPLEMENTATIONS)
        rows.append(
            {
                "shape": name,
                "method": method,
                "device": device,
                "tokens": tokens,
                "ms": found,
                "of_one_by_one": found["at once"] / found["one by one"],
                "of_transformers_bf16": found["at once"] / best,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--method", default="bnb-nf4")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for name in asked.shapes:
            measured = measure(name, asked.method, asked.tokens, asked.rounds, asked.device)
            for row in measured:
                times = ", ".join(f"{way} {spent:.2f}" for way, spent in row["ms"].items())
                print(
                    f"{name:10} {row['tokens']:4} tokens: {times} ms;"
                    f" of one by one {row['of_one_by_one']:.2f},"
                    f" of transformers' bf16 {row['of_transformers_bf16']:.2f}",
                    flush=True,
                )
            rows += measured
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
