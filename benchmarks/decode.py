"""Decoding on CPU, one sequence: tokens a second beside the peers, and where the time goes.

    python benchmarks/decode.py WORK                       ours, transformers bf16, bitsandbytes NF4
    python benchmarks/decode.py WORK --llama BIN           and llama.cpp's Q4_0 (llama-bench there)
    python benchmarks/decode.py WORK --method gguf-q4_0 --rounds 5 --json out.json

A fabricated Llama of 252M (random weights, 16 layers of 1024). All contenders are loaded in one
process and take turns, ``--tokens`` each after a prompt; llama-bench runs as a program in its turn.
Shown is the lower quartile of all tokens' times, which other work on the machine disturbs least.
``compiled`` is a static cache and one graph for a token, called from C++ (the compiler's option
``cpp_wrapper``), with transformers' attention in single operations
(``set_attn_implementation("eager")``), which the compiler fuses, where PyTorch's own works head by
head through MKL; ``unguarded`` the same with
``torch.compiler.skip_guard_on_all_nn_modules_unsafe``, for models that nobody changes any more.
The output head stays bf16 everywhere but in llama.cpp's file (Q6_K) and in the rows called
``+head``, where ``--head`` quantizes it.

Where the time goes is measured in rounds of their own, by a clock around every linear, the
attention function and the head; ``rest`` is the remainder: norms, rotary embedding, cache, Python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fabricate import fabricate
from torch import Tensor, nn

PROMPT = 16


Decode = Callable[[int], list[float]]
"""Decodes so many tokens after a prompt; the seconds that each one took."""


def tokens_of(step: Callable[[Tensor], Tensor], token: Tensor, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        token = step(token)
        times.append(time.perf_counter() - start)
    return times


def eager(model: nn.Module, started: Callable[[], None] = lambda: None) -> Decode:
    """With the cache that transformers takes by itself; ``started`` is called after the prompt."""
    from transformers import DynamicCache

    prompt = torch.arange(3, 3 + PROMPT).unsqueeze(0)

    def decode(count: int) -> list[float]:
        cache = DynamicCache(config=model.config)

        def step(token: Tensor) -> Tensor:
            found: Tensor = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            return found

        token = step(prompt)
        started()
        return tokens_of(step, token, count)

    return decode


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """With attention in single operations, for the compiler to fuse."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def compiled(model: nn.Module, most: int, guarded: bool = True) -> Decode:
    """With a static cache and one compiled graph for the whole step.

    What is not ``guarded`` doesn't look at each call whether the modules are as they were.
    """
    from transformers import StaticCache

    prompt = torch.arange(3, 3 + PROMPT).unsqueeze(0)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + most)

    def step_of(token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        found = model(token, past_key_values=cache, position_ids=position)
        return found.logits[:, -1:].argmax(-1), position + 1

    # What is compiled is kept with the code, and guards on modules tell models apart.
    step_of.__code__ = step_of.__code__.replace()
    options: dict[str, Any] = {"cpp_wrapper": True}
    if not guarded:
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    graph = torch.compile(step_of, fullgraph=True, dynamic=False, options=options)

    def decode(count: int) -> list[float]:
        cache.reset()
        position = torch.tensor([[PROMPT]])

        def step(token: Tensor) -> Tensor:
            nonlocal position
            token, position = graph(token, position)
            return token

        with plain_attention(model):
            token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
            return tokens_of(step, token, count)

    return decode


def llama_bench(binary: Path, file: Path, threads: int) -> Decode:
    """By llama.cpp's own benchmark program, a few tokens at a time."""

    def decode(count: int) -> list[float]:
        asked = [binary, "-m", file, "-p", 0, "-n", 8, "-t", threads, "-r", max(1, count // 8)]
        command = [*map(str, asked), "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [seconds / 8e9 for seconds in json.loads(done.stdout)[0]["samples_ns"]]

    return decode


@contextmanager
def clocks(model: nn.Module) -> Iterator[Counter[str]]:
    """Seconds spent in linears, attention and head while the context lasts."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    spent: Counter[str] = Counter()

    def around(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **kwargs)
            spent[what] += time.perf_counter() - start
            return found

        return timed

    head = model.get_output_embeddings()
    linears = [
        module for name, module in model.named_modules() if name.endswith("_proj") or module is head
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


def nf4() -> Any:
    """bitsandbytes' NF4, as transformers is asked for it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--method", default="quanto-int4", help="of ours (quanto-int4: affine g128)"
    )
    parser.add_argument("--head", action="store_true", help="rows with a quantized head, too")
    parser.add_argument("--llama", type=Path, help="folder of llama-bench and llama-quantize")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", help="contenders whose name begins so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    import transformers
    from transformers import AutoModelForCausalLM

    import quantmill

    transformers.utils.logging.disable_progress_bar()

    source = fabricate(options.work / "llama-252m", "252m")
    runs: dict[str, Decode] = {}
    models: dict[str, nn.Module] = {}

    def wanted(name: str) -> bool:
        return not options.only or any(name.startswith(item) for item in options.only)

    def peer(**more: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **more).eval()

    if wanted("transformers"):
        models["transformers bf16"] = peer()
    if wanted("bitsandbytes"):
        models["bitsandbytes NF4"] = peer(quantization_config=nf4())
    if wanted("quantmill"):
        models["quantmill"] = quantmill.load(source, options.method).eval()
        if options.head:
            models["quantmill +head"] = quantmill.load(
                source, options.method, include=["lm_head"]
            ).eval()
    runs |= {name: eager(model) for name, model in models.items()}
    for name in list(models):
        if name.startswith("quantmill"):
            runs[f"{name}, compiled"] = compiled(models[name], options.tokens + 1)
            runs[f"{name}, unguarded"] = compiled(models[name], options.tokens + 1, guarded=False)
    if options.llama and wanted("llama.cpp"):
        file = gguf_file(source, options.work / "q4_0.gguf", options.llama / "llama-quantize")
        runs["llama.cpp Q4_0"] = llama_bench(options.llama / "llama-bench", file, options.threads)
    for decode in runs.values():
        decode(2)  # packs, compiles, warms up
    report(measure(runs, options), parts_of(models, options.tokens), options)


def measure(runs: dict[str, Decode], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each token of each contender."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, decode in runs.items():
            # The first token finds the threads asleep.
            times[name] += decode(options.tokens + 1)[1:] if "llama" not in name else decode(8)
    return times


def quartile(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]


PARTS = ("linears", "attention", "head", "rest")


def parts_of(models: dict[str, nn.Module], tokens: int) -> dict[str, dict[str, float]]:
    """Seconds a token in the parts of each model."""
    found = {}
    for name, model in models.items():
        rows: list[dict[str, float]] = []
        with clocks(model) as spent:
            decode = eager(model, spent.clear)
            for _ in range(tokens):
                whole = decode(1)[0]
                rows.append({**spent, "rest": whole - sum(spent.values())})
        found[name] = {part: quartile([row[part] for row in rows]) for part in PARTS}
    return found


def report(
    times: dict[str, list[float]], parts: dict[str, dict[str, float]], options: argparse.Namespace
) -> None:
    middle = {name: quartile(found) for name, found in times.items()}
    base = middle.get("bitsandbytes NF4")
    rows = []
    for name, seconds in middle.items():
        row = {"who": name, "tokens_per_second": 1 / seconds, "milliseconds": 1e3 * seconds}
        if base:
            row["of_bitsandbytes"] = base / seconds
        rows.append(row)
        beside = f"  {base / seconds:5.2f} x bitsandbytes" if base else ""
        print(f"{name:26} {1 / seconds:7.1f} tokens/s {1e3 * seconds:7.2f} ms{beside}")
    for name, spent in parts.items():
        text = ", ".join(f"{part} {1e3 * spent[part]:.2f}" for part in PARTS)
        print(f"{name:26} ms a token: {text}")
    if options.json:
        head = {"method": options.method, "threads": options.threads, "tokens": options.tokens}
        text = json.dumps({**head, "rows": rows, "parts": parts}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
