"""Train novella, a small Llama, from scratch on public-domain English novels.

    python train.py --corpus CORPUS_DIR --out OUT_DIR [--compile]

CORPUS_DIR holds train.txt.xz, val.txt, held.txt, held2.txt, sources.json and
tokenizer.json. OUT_DIR becomes a model folder that transformers can load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import platform
import random
import shutil
import time
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS = 0, 1
CONTEXT = 512
COLUMNS = {"step": "d", "train_loss": ".4f", "val_loss": ".4f", "lr": ".3e"}


def split_bytes(corpus: Path, split: str) -> bytes:
    if split == "train":
        return lzma.decompress((corpus / "train.txt.xz").read_bytes())
    return (corpus / f"{split}.txt").read_bytes()


def books(corpus: Path, split: str) -> list[str]:
    """The texts of one split, cut at the offsets that sources.json gives."""
    raw = split_bytes(corpus, split)
    entries = json.loads((corpus / "sources.json").read_text(encoding="utf-8"))["books"]
    spans = [(b["byte_offset"], b["bytes"]) for b in entries if b["split"] == split]
    return [raw[start : start + size].decode("utf-8") for start, size in spans]


def token_stream(corpus: Path, tokenizer: tokenizers.Tokenizer, split: str) -> Tensor:
    ids: list[int] = []
    for text in books(corpus, split):
        ids += [BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS]
    return torch.tensor(ids)


def excerpt(text: str, size: int) -> str:
    """About the first `size` characters, ended at a paragraph."""
    return text[: text.rindex("\n\n", 0, size) + 1]


def write_excerpts(corpus: Path, out: Path) -> None:
    (out / "held.txt").write_text(excerpt(books(corpus, "held")[0], 80_000), encoding="utf-8")
    # Every fourth book, from its middle: calibration should see many authors, not one.
    parts = []
    for text in books(corpus, "train")[::4]:
        start = text.index("\n\n", len(text) // 2) + 2
        parts.append(excerpt(text[start:], 18_000))
    (out / "calib.txt").write_text("\n".join(parts), encoding="utf-8")


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)
    # Llama has no residual dropout, and this corpus is small enough to need it. Hooks add it
    # for training without changing the architecture that is saved.
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, y: F.dropout(y, args.dropout, m.training))
    return model


def windows(stream: Tensor, start: int = 0) -> Tensor:
    """Rows of CONTEXT inputs and one last target; neighbours share that one token."""
    return stream[start:].unfold(0, CONTEXT + 1, CONTEXT)


def batch_loss(model: nn.Module, rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, stream: Tensor, batch: int = 32) -> float:
    model.eval()
    rows = windows(stream)
    total = 0.0
    for part in torch.split(rows, batch):
        total += batch_loss(model, part).item() * len(part)
    model.train()
    return total / len(rows)


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    warm = min(1.0, (step + 1) / args.warmup)
    done = max(0.0, (step - args.warmup) / max(1, steps - args.warmup))
    floor = 0.02
    return float(args.lr * warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))))


def fit(
    model: LlamaForCausalLM, train: Tensor, val: Tensor, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Returns the loss curve and the weights of its best validation loss."""
    device = train.device
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": args.weight_decay}]
    groups.append({"params": norms, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    step_model: Any = torch.compile(model) if args.compile else model
    dice = random.Random(args.seed)
    shuffle = torch.Generator().manual_seed(args.seed)
    per_epoch = (len(train) // CONTEXT - 2) // args.batch
    steps = args.steps or int(args.epochs * per_epoch)
    curve: list[dict[str, Any]] = []
    best, best_loss = {}, math.inf
    running = torch.zeros((), device=device)
    since, began = 0, time.monotonic()
    for step in range(steps):
        if step % per_epoch == 0:
            # A new offset each epoch, so that the window borders never fall the same way twice.
            rows = windows(train, dice.randrange(CONTEXT))
            order = torch.randperm(len(rows), generator=shuffle).to(device)
        at = step % per_epoch * args.batch
        batch = rows[order[at : at + args.batch]]
        # Half of the windows open with bos: prompts in mid-book are then familiar with or
        # without it, where a plain stream would show bos only at the 26 openings.
        batch[: args.batch // 2, 0] = BOS
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = batch_loss(step_model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        since += 1
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            val_loss = evaluate(model, val)
            train_loss = running.item() / since
            row = (step + 1, train_loss, val_loss, lr)
            curve.append(dict(zip(COLUMNS, row, strict=True)))
            running, since = torch.zeros_like(running), 0
            if val_loss < best_loss:
                best_loss = val_loss
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            seconds = time.monotonic() - began
            print(
                f"step {step + 1}/{steps} epoch {(step + 1) / per_epoch:.2f} "
                f"train {train_loss:.4f} val {val_loss:.4f} lr {lr:.2e} {seconds:.0f}s",
                flush=True,
            )
    return curve, best


def write_tokenizer(corpus: Path, out: Path) -> None:
    shutil.copyfile(corpus / "tokenizer.json", out / "tokenizer.json")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>"}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": CONTEXT}
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train novella from scratch.")
    add = parser.add_argument
    add("--corpus", type=Path, required=True)
    add("--out", type=Path, required=True)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="torch.compile the training step")
    add("--steps", type=int, default=0, help="overrides --epochs")
    defaults = {"seed": 20, "batch": 64, "epochs": 32.0, "lr": 2e-3, "warmup": 200}
    defaults |= {"weight-decay": 0.1, "dropout": 0.2, "eval-every": 100}
    for name, value in defaults.items():
        add(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(args.corpus / "tokenizer.json"))
    splits = ("train", "val", "held", "held2")
    streams = {s: token_stream(args.corpus, tokenizer, s).to(args.device) for s in splits}
    model = build(args).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(streams['train']):,} training tokens", flush=True)
    curve, best = fit(model, streams["train"], streams["val"], args)

    model.load_state_dict(best)
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    write_tokenizer(args.corpus, args.out)
    write_excerpts(args.corpus, args.out)
    lines = [",".join(COLUMNS)]
    lines += [",".join(format(row[name], form) for name, form in COLUMNS.items()) for row in curve]
    (args.out / "loss.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Measured on the rounded weights, since those are what the folder holds.
    losses = {s: evaluate(model, streams[s]) for s in splits[1:]}
    top = min(curve, key=lambda row: row["val_loss"])
    skip = {"corpus", "out", "device"}
    record = {
        "model": "novella",
        "parameters": count,
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, safetensors)},
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "hyperparameters": {k: v for k, v in vars(args).items() if k not in skip},
        "tokens": {s: len(stream) for s, stream in streams.items()},
        "steps": curve[-1]["step"],
        "best_step": top["step"],
        "train_loss_at_best": round(top["train_loss"], 4),
        "loss_bf16": {s: round(v, 4) for s, v in losses.items()},
        "perplexity_bf16": {s: round(math.exp(v), 3) for s, v in losses.items()},
        "sha256": {
            "model.safetensors": sha256((args.out / "model.safetensors").read_bytes()),
            **{f"corpus {s}.txt": sha256(split_bytes(args.corpus, s)) for s in splits},
        },
    }
    write_json(args.out / "provenance.json", record)
    print(json.dumps(record["perplexity_bf16"]), flush=True)


if __name__ == "__main__":
    main()
