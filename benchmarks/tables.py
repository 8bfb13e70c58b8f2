"""What each table consists of: scripts of this folder, their arguments, and the peers beside them.

In arguments, ``{work}`` stands for the folder of fabricated models and outputs, ``{gptqmodel}`` for
the interpreter of an environment with GPTQModel, ``{llama}`` for the folder of llama.cpp's programs
and libraries, and ``{json}`` for the file that the script writes, unless it prints JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LOWER, HIGHER = "lower", "higher"


@dataclass(frozen=True)
class Step:
    """One run of a script."""

    title: str
    reading: str
    """What is measured and how its ratios are read."""
    script: str
    arguments: tuple[str, ...]
    """Those of every run."""
    full: tuple[str, ...] = ()
    """Those of a run whose figures count."""
    quick: tuple[str, ...] = ()
    """Those that show within a minute or so that it works."""
    beside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Peers that are measured too, and the arguments that ask for it."""
    needs: tuple[str, ...] = ()
    """Peers without which there is nothing to run."""
    ratios: dict[str, str] = field(default_factory=dict)
    """Columns that are ratios to a peer or a bound, and which side of 1 is the better one."""


LIBRARIES = (
    "transformers",
    "bitsandbytes",
    "torchao",
    "hqq",
    "optimum-quanto",
    "compressed-tensors",
    "gguf",
    "peft",
)
"""Peers that are looked for in the environment that runs us, by distribution."""

LOAD = (
    Step(
        "Loading and quantizing while loading",
        "A Llama of 1.1B: seconds and peak memory after the imports, each load in a process of its"
        " own, in turn. `ratio` is our median time by that of transformers.",
        "load.py",
        ("{work}", "--layers", "--json"),
        quick=("--what", "bnb-nf4", "--rounds", "1"),
        beside={"transformers": ("--peer",)},
        needs=("transformers", "bitsandbytes"),
        ratios={"ratio": LOWER},
    ),
    Step(
        "GGUF files",
        "Files of a model of 252M. `ratio` is our median time by that of transformers; `of_bound`"
        " our peak by 1.2 times the file and 64 MiB. transformers makes floats of it, we keep it.",
        "gguf_load.py",
        ("{work}", "--json"),
        quick=("--types", "q4_k_m", "--rounds", "1"),
        beside={"transformers": (), "gguf": ("--peer",)},
        needs=("transformers",),
        ratios={"ratio": LOWER, "of_bound": LOWER},
    ),
    Step(
        "Quantizing while loading, backend by backend",
        "The Llama of 1.1B again. `ratio` is our best time by the peer's; `of_bound` our peak by"
        " 1.15 times the model and 64 MiB.",
        "backends.py",
        ("load", "{work}", "--json"),
        full=("--rounds", "3"),
        quick=("--only", "torchao-int8wo", "hqq-4", "--size", "252m"),
        beside={
            "transformers": ("--peer",),
            "torchao": (),
            "optimum-quanto": (),
            "hqq": (),
            "compressed-tensors": (),
        },
        ratios={"ratio": LOWER, "of_bound": LOWER},
    ),
)
QUANTIZE = (
    Step(
        "Calibrated quantization",
        "GPTQ and AWQ of two random blocks of width 2048 (quick: one) with the same tokens. `time`"
        " is ours by GPTQModel's, both from the start of the process until the files are written.",
        "calibrated.py",
        ("{work}", "--json"),
        full=("--wide", "2"),
        quick=("--wide", "1", "--samples", "8", "--only", "4-bit g128 sym"),
        beside={"GPTQModel": ("--peer-python", "{gptqmodel}")},
        ratios={"time": LOWER, "time_without_start": LOWER},
    ),
    Step(
        "The half-quadratic search",
        "`time_ratio` is our time by hqq's, the best of the repeats; `objective_ratio` what we"
        " reach of the objective by what hqq stores: at 1 and below nothing was given up for it.",
        "hqq_search.py",
        ("--json",),
        quick=("--bits", "4", "--axis", "1", "--rows", "256", "--layers", "normal"),
        beside={"hqq": ()},
        needs=("hqq",),
        ratios={"time_ratio": LOWER, "objective_ratio": LOWER, "l2_ratio": LOWER},
    ),
    Step(
        "ggml's types, encoding",
        "A square matrix to each type; `ratio` is our time by that of ggml's C function over the"
        " same number of threads, the fastest of the rounds.",
        "gguf_types.py",
        ("encode", "{llama}", "--json"),
        quick=("--types", "Q4_0", "Q4_K", "--size", "512", "--rounds", "2"),
        beside={"llama.cpp": ()},
        needs=("llama.cpp",),
        ratios={"ratio": LOWER},
    ),
)
KERNELS = (
    Step(
        "Matmul on CPU",
        "Cold weights. `share_of_read` is the time of a plain read of as many bytes by the"
        " call's, `kernel_share_of_read` by that of the C function alone: 1 is the memory's own"
        " speed. `of_linear_bf16` is the call's time by that of bf16 F.linear, `of_llamacpp` the C"
        " function's by that of llama.cpp's own product. Lower quartiles over the rounds.",
        "cpu_matmul.py",
        ("--json", "{json}"),
        beside={"llama.cpp": ("--llama", "{llama}")},
        quick=("--shape", "1024x1024", "--batch", "1", "--rounds", "5", "--megabytes", "16"),
        ratios={"share_of_read": HIGHER, "of_linear_bf16": LOWER, "of_llamacpp": LOWER},
    ),
    Step(
        "Linears of every backend on CPU",
        "One row through the module of a model, cold. `of_linear_bf16` is its time by that of"
        " bf16 F.linear. Lower quartiles over the rounds.",
        "linears.py",
        ("--json", "{json}"),
        quick=("quanto-int4", "--size", "512", "--rounds", "5", "--megabytes", "2"),
        ratios={"of_linear_bf16": LOWER},
    ),
    Step(
        "Experts of a mixture on CPU",
        "One layer's experts, NF4. `of_one_by_one` is the time of one product for all by that of a"
        " call for each, `of_transformers_bf16` by that of the faster of transformers' own ways"
        " with bf16 weights. Lower quartiles over the rounds.",
        "experts.py",
        ("--json", "{json}"),
        quick=("qwen3-moe", "--rounds", "3"),
        beside={"transformers": ()},
        needs=("transformers", "bitsandbytes"),
        ratios={"of_one_by_one": LOWER, "of_transformers_bf16": LOWER},
    ),
    Step(
        "Decoding on CPU",
        "One sequence through a Llama of 252M, lower quartile of the tokens' times;"
        " `of_bitsandbytes` is tokens a second by bitsandbytes' NF4.",
        "decode.py",
        ("{work}", "--json", "{json}"),
        quick=("--rounds", "1", "--tokens", "2"),
        beside={"transformers": (), "bitsandbytes": (), "llama.cpp": ("--llama", "{llama}")},
        needs=("transformers", "bitsandbytes"),
        ratios={"of_bitsandbytes": HIGHER},
    ),
    Step(
        "Training adapters on CPU",
        "A step of LoRA (PEFT) on all linears of a Llama of 252M, 256 tokens; `of_bitsandbytes` is"
        " its time, the fastest of the rounds, by that with bitsandbytes' NF4.",
        "train.py",
        ("{work}", "--json", "{json}"),
        quick=("--rounds", "1", "--tokens", "16", "--methods", "quanto-int4"),
        beside={"transformers": (), "bitsandbytes": (), "peft": ()},
        needs=("transformers", "bitsandbytes", "peft"),
        ratios={"of_bitsandbytes": LOWER},
    ),
    Step(
        "ggml's types, decoding",
        "GB/s of float32 written, one thread, the fastest of the rounds; `ggml` and `gguf-py` are"
        " our rate by theirs.",
        "gguf_types.py",
        ("decode", "{llama}", "--json"),
        quick=("--types", "Q4_0", "Q4_K", "--rounds", "2"),
        beside={"llama.cpp": (), "gguf": ()},
        needs=("llama.cpp", "gguf"),
        ratios={"ggml": HIGHER, "gguf-py": HIGHER},
    ),
    Step(
        "4-bit matmul on CUDA",
        "Cold weights, replayed graphs, in turn with bf16 cuBLAS, bitsandbytes and torch's int4.",
        "triton_matmul.py",
        ("--json",),
        quick=("--shapes", "4096x4096", "--rows", "1"),
        beside={"bitsandbytes": ()},
        needs=("CUDA",),
    ),
    Step(
        "FP8 linears on CUDA",
        "Time of bfloat16's F.linear by ours: above 1 is faster.",
        "fp8_linear.py",
        (),
        quick=("--tokens", "512", "--width", "2048"),
        needs=("CUDA",),
    ),
)
QUALITY = (
    Step(
        "Calibrated quantization",
        "Mean KL per token to the float model on held-out windows of novella; `ratio` is our KL by"
        " that of GPTQModel from the same tokens, `ratio_95` its interval over paired windows.",
        "calibrated.py",
        ("{work}", "--json"),
        quick=("--samples", "8", "--windows", "4", "--only", "4-bit g128 sym"),
        beside={"GPTQModel": ("--peer-python", "{gptqmodel}")},
        ratios={"ratio": LOWER},
    ),
    Step(
        "Quantization without data",
        "KL as above; the library that owns a format quantizes every linear itself. `ratio` is our"
        " KL by the library's: 1 where both round alike.",
        "backends.py",
        ("kl", "--json"),
        quick=("--windows", "4", "--only", "hqq 4-bit", "quanto int4"),
        beside={"torchao": (), "hqq": (), "optimum-quanto": (), "compressed-tensors": ()},
        ratios={"ratio": LOWER},
    ),
    Step(
        "Several methods under a budget",
        "`ratio` is the KL of the mixture by that of the best uniform methods at the same bytes,"
        " interpolated in KL; `ratio_log` interpolated in its logarithm, which asks more.",
        "budget.py",
        ("{work}/budget", "--json"),
        quick=("--budgets", "3", "--methods", "gptq-2;gptq-4", "--windows", "4", "--samples", "8"),
        ratios={"ratio": LOWER, "ratio_log": LOWER},
    ),
)
MEMORY = (
    Step(
        "Estimates of plan and choose",
        "What is said by what is then measured, for each method: weights, and the peaks of"
        " loading, running and quantizing. 1 is exact.",
        "needs.py",
        ("{work}/needs", "--json"),
        quick=("--methods", "bnb-nf4"),
    ),
    Step(
        "Loading, by the number of layers",
        "`beyond_model` is the peak less the loaded model: flat where memory doesn't grow with the"
        " checkpoint, and below zero where floats stay in the mapped file.",
        "load.py",
        ("{work}", "--what", "--json"),
        quick=("--layers", "2", "4"),
        needs=("transformers", "bitsandbytes"),
    ),
    Step(
        "Calibrated quantization, by the number of layers",
        "`above` is the peak above that of one layer: flat likewise.",
        "calibration_memory.py",
        ("{work}/calibration", "--json"),
        quick=("--layers", "2", "4"),
    ),
)
STARTUP = (
    Step(
        "Commands without a model",
        "Wall time; `ratio` is to `python -c pass`, of which 20 times is the target.",
        "startup.py",
        ("--json",),
        quick=("--rounds", "1"),
    ),
    Step(
        "Planning a Llama 3.1 405B from its headers",
        "Seconds and peak memory above the imports; targets are 5 s and 100 MB.",
        "plan.py",
        ("--json",),
        quick=("--rounds", "1"),
    ),
)
TABLES: dict[str, tuple[Step, ...]] = {
    "load": LOAD,
    "quantize": QUANTIZE,
    "kernels": KERNELS,
    "quality": QUALITY,
    "memory": MEMORY,
    "startup": STARTUP,
}
