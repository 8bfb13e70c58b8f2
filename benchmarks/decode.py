"""Decoding on CPU, one sequence: tokens a second beside the peers, and where the time goes.

    python benchmarks/decode.py WORK                       ours, transformers bf16, bitsandbytes NF4
    python benchmarks/decode.py WORK --llama BIN           and llama.cpp's Q4_0 (llama-bench there)
    python benchmarks/decode.py WORK --method gguf-q4_0 --rounds 5 --json out.json

A fabricated Llama of 252M (random weights, 16 layers of 1024). All contenders are loaded in one
process and take turns, ``--tokens`` each after a prompt; llama-bench runs as a program in its turn.
Shown is the median over the rounds. The output head stays bf16 everywhere but in llama.cpp's file
(Q6_K) and in the rows called ``+head``, where ``--head`` quantizes it.

Where the time goes is measured in rounds of their own, by a clock around every linear, the
attention function and the head; ``rest`` is the remainder: norms, rotary embedding, cache, Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fabricate import fabricate
from torch import nn

PROMPT = 16


def eager(model: nn.Module) -> Callable[[int], float]:
    """Seconds for so many tokens, with the cache that transformers takes by itself."""
    from transformers import DynamicCache

    prompt = torch.arange(3, 3 + PROMPT).unsqueeze(0)

    def decode(count: int) -> float:
        cache = DynamicCache(config=model.config)
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(count):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    return decode


def compiled(model: nn.Module, most: int) -> Callable[[int], float]:
    """The same with a static cache and one compiled graph for the whole step."""
    from transformers import StaticCache

    prompt = torch.arange(3, 3 + PROMPT).unsqueeze(0)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + most)

    @torch.compile(fullgraph=True, dynamic=False)
    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        found = model(token, past_key_values=cache, position_ids=position)
        return found.logits[:, -1:].argmax(-1)

    def decode(count: int) -> float:
        cache.reset()
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        position = torch.tensor([[PROMPT]])
        start = time.perf_counter()
        for _ in range(count):
            token = step(token, position)
            position = position + 1
        return time.perf_counter() - start

    return decode


def llama_bench(binary: Path, file: Path, threads: int) -> Callable[[int], float]:
    """The same by llama.cpp's own benchmark program."""

    def decode(count: int) -> float:
        asked = [binary, "-m", file, "-p", 0, "-n", count, "-t", threads, "-r", 1, "-o", "json"]
        done = subprocess.run(list(map(str, asked)), capture_output=True, text=True, check=True)
        return count / float(json.loads(done.stdout)[0]["avg_ts"])

    return decode


@contextmanager
def clocks(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds spent in linears, attention and head while the context lasts."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    spent = {"linears": 0.0, "attention": 0.0, "head": 0.0}

    def around(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **kwargs)
            spent[what] += time.perf_counter() - start
            return found

        return timed

    head = model.get_output_embeddings()
    linears = [
        module
        for name, module in model.named_modules()
        if name.endswith("_proj") or module is head
    ]
    for module in linears:
        what = "head" if module is head else "linears"
        module.forward = around(module.forward, what)  # type: ignore[method-assign]
    kind = model.config._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS[kind]
    ALL_ATTENTION_FUNCTIONS[kind] = around(plain, "attention")
    try:
        yield spent
    finally:
        ALL_ATTENTION_FUNCTIONS[kind] = plain
        for module in linears:
            del module.forward


def gguf_file(source: Path, out: Path, quantize: Path) -> Path:
    """The same weights in llama.cpp's Q4_0, made by its own program."""
    if out.exists():
        return out
    import gguf
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    plain = out.with_name("f16.gguf")
    writer = gguf.GGUFWriter(plain, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            dtype = torch.float32 if tensor.ndim == 1 else torch.float16
            known = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(known, tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    subprocess.run([quantize, plain, out, "Q4_0"], capture_output=True, check=True)
    plain.unlink()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--method", default="hqq-4", help="of ours (default: hqq-4, affine g64)")
    parser.add_argument("--head", action="store_true", help="rows with a quantized head, too")
    parser.add_argument("--llama", type=Path, help="folder of llama-bench and llama-quantize")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", help="contenders whose name begins so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import quantmill

    source = fabricate(options.work / "llama-252m", "252m")
    runs: dict[str, Callable[[int], float]] = {}
    models: dict[str, nn.Module] = {}

    def wanted(name: str) -> bool:
        return not options.only or any(name.startswith(item) for item in options.only)

    def peer(**more: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **more).eval()

    if wanted("transformers"):
        models["transformers bf16"] = peer()
    if wanted("bitsandbytes"):
        models["bitsandbytes NF4"] = peer(
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        )
    if wanted("quantmill"):
        models["quantmill"] = quantmill.load(source, options.method).eval()
        if options.head:
            models["quantmill +head"] = quantmill.load(
                source, options.method, include=["lm_head"]
            ).eval()
    runs |= {name: eager(model) for name, model in models.items()}
    for name in list(models):
        if name.startswith("quantmill"):
            runs[f"{name}, compiled"] = compiled(models[name], options.tokens)
    if options.llama and wanted("llama.cpp"):
        file = gguf_file(source, options.work / "q4_0.gguf", options.llama / "llama-quantize")
        runs["llama.cpp Q4_0"] = llama_bench(
            options.llama / "llama-bench", file, options.threads
        )
    times: dict[str, list[float]] = {name: [] for name in runs}
    for decode in runs.values():
        decode(options.tokens)  # packs, compiles, warms up
    for _ in range(options.rounds):
        for name, decode in runs.items():
            times[name].append(decode(options.tokens) / options.tokens)
    parts: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        with clocks(model) as spent:
            decode = eager(model)
            decode(4)
            for what in spent:
                spent[what] = 0.0
            whole = decode(options.tokens)
        parts[name] = {what: seconds / options.tokens for what, seconds in spent.items()}
        # The prompt's pass is in the clocks of its parts, and not in the whole.
        parts[name]["whole"] = whole / options.tokens
    report(times, parts, options)


def report(
    times: dict[str, list[float]], parts: dict[str, dict[str, float]], options: argparse.Namespace
) -> None:
    middle = {name: statistics.median(found) for name, found in times.items()}
    base = middle.get("bitsandbytes NF4")
    rows = []
    for name, seconds in middle.items():
        row = {"who": name, "tokens_per_second": 1 / seconds, "milliseconds": 1e3 * seconds}
        row["spread"] = [1 / max(times[name]), 1 / min(times[name])]
        if base:
            row["of_bitsandbytes"] = base / seconds
        rows.append(row)
        beside = f"  {base / seconds:5.2f} x bitsandbytes" if base else ""
        print(f"{name:26} {1 / seconds:7.1f} tokens/s {1e3 * seconds:7.2f} ms{beside}")
    for name, spent in parts.items():
        rest = spent["whole"] - sum(spent[what] for what in ("linears", "attention", "head"))
        spent["rest"] = rest
        text = ", ".join(
            f"{what} {1e3 * spent[what]:.2f}" for what in ("linears", "attention", "head", "rest")
        )
        print(f"{name:26} ms a token: {text}")
    if options.json:
        head = {"method": options.method, "threads": options.threads, "tokens": options.tokens}
        text = json.dumps({**head, "rows": rows, "parts": parts}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
