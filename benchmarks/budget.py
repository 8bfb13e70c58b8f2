"""Mixed precision under a budget beside every method alone: KL divergence at the same bytes.

    python benchmarks/budget.py WORK_FOLDER [--model models/novella] [--budgets 4.25 3.5 3.0]
        [--uniform "gptq-2;gptq-3;gptq-4;gptq-5"] [--methods "gptq-2;gptq-3:sym=false;..."]
        [--windows 40] [--json]

The search runs on the calibration text, KL is measured on the held-out text. Methods alone are
calibrated on all windows, as the mixtures in the end are (the search holds some of them back).

A mixture is held against three sets. `named`: the widths as a user names them, with one group size
for all (`--uniform`). `any`: those and whatever the search may choose from (`--methods`: other
groups, asymmetric) put on every target alike. `thorough`: those, and the search's choices made as
thoroughly as the mixture. What the best of a set has at a budget is
interpolated between any two of them, in KL (what a random mixture of them would have) and in its
logarithm (which asks more). Seconds are those of the search: every method alone, the sensitivities,
the allocation. Methods that lie in WORK_FOLDER from an earlier run are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import quantmill
from quantmill.budget.choices import Budget
from quantmill.budget.search import BudgetSearch
from quantmill.judging import Judge

ROOT = Path(__file__).resolve().parents[1]
UNIFORM = "gptq-2;gptq-3;gptq-4;gptq-5"
METHODS = (
    "gptq-2;gptq-3:group_size=-1,sym=false;gptq-3:sym=false;gptq-3:group_size=64,sym=false;"
    "gptq-4:group_size=-1,sym=false;gptq-4:sym=false;gptq-4:group_size=64,sym=false;"
    "gptq-5:group_size=-1,sym=false;gptq-5:sym=false"
)
"""Zero points cost few bytes; groups of a whole row and of 64 stand between the widths."""


def interpolated(points: list[tuple[float, float]], bits: float, *, logarithm: bool) -> float:
    """The least KL of a straight line between two points, at ``bits``."""
    best = math.inf
    for x0, y0 in points:
        for x1, y1 in points:
            if x0 <= bits <= x1 and x0 < x1:
                share = (bits - x0) / (x1 - x0)
                between = y0 ** (1 - share) * y1**share if logarithm else y0 + share * (y1 - y0)
                best = min(best, between)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "novella")
    parser.add_argument("--budgets", type=float, nargs="*", default=[4.25, 3.5, 3.0])
    parser.add_argument("--uniform", default=UNIFORM)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    calibration, held = options.model / "calib.txt", options.model / "held.txt"
    judge = Judge(options.model, held.read_text(encoding="utf-8"), max_windows=options.windows)

    def kl(folder: Path) -> tuple[float, float]:
        result = judge.judge(quantmill.load(folder))
        assert result.kl_mean is not None
        return result.kl_mean, result.kl_stderr or 0.0

    shared = {"samples": options.samples, "length": options.length}
    search = BudgetSearch(
        options.model,
        options.work / "mixture",
        options.methods.split(";"),
        calibration,
        **shared,
    )
    named, choices = options.uniform.split(";"), options.methods.split(";")
    uniform = []
    for label in dict.fromkeys([*named, *choices, *search.finals]):
        folder = options.work / re.sub(r"[^a-z0-9]+", "_", f"uniform {label}")
        if not folder.exists():
            quantmill.quantize(options.model, folder, label, calibration=calibration, **shared)
        mean, error = kl(folder)
        bits = quantmill.plan(options.model, label).totals["bits_per_weight"]
        uniform.append({"method": label, "bits": bits, "kl": mean, "stderr": error})
    points = {
        "named": [(item["bits"], item["kl"]) for item in uniform if item["method"] in named],
        "any": [
            (item["bits"], item["kl"]) for item in uniform if item["method"] in [*named, *choices]
        ],
        "thorough": [(item["bits"], item["kl"]) for item in uniform],
    }
    rows: list[dict[str, Any]] = []
    with search:
        search.run(measure=24)
        for bits in options.budgets:
            folder = options.work / f"mixture-{bits}"
            shutil.rmtree(folder, ignore_errors=True)
            report = search.write(Budget(bits), folder)
            mean, error = kl(folder)
            rows.append(
                {
                    "budget": bits,
                    "bits": report.bits,
                    "kl": mean,
                    "stderr": error,
                    "estimated": report.estimated,
                    "ratio": {
                        name: mean / interpolated(item, report.bits, logarithm=False)
                        for name, item in points.items()
                    },
                    "ratio_log": {
                        name: mean / interpolated(item, report.bits, logarithm=True)
                        for name, item in points.items()
                    },
                    "counts": report.counts,
                    "correlation": report.correlation,
                    "seconds": sum(report.seconds.values()) - report.seconds["the mixture"],
                    "quant_method": json.loads((folder / "config.json").read_text())[
                        "quantization_config"
                    ]["quant_method"],
                }
            )
    if options.json:
        print(
            json.dumps({"uniform": uniform, "budgets": rows, "seconds": search.seconds}, indent=2)
        )
        return
    for item in sorted(uniform, key=lambda item: item["bits"]):
        print(
            f"{item['method']:45} {item['bits']:.3f} bits  KL {item['kl']:.5f}"
            f" +- {item['stderr']:.5f}"
        )
    for row in rows:
        print(
            f"budget {row['budget']:<5} {row['bits']:.4f} bits  KL {row['kl']:.5f}"
            f" +- {row['stderr']:.5f} (estimated {row['estimated']:.5f})"
            f"  {row['quant_method']} {row['counts']}"
        )
        ratios = (
            f"{name} {row['ratio'][name]:.3f} ({row['ratio_log'][name]:.3f} in logarithms)"
            for name in points
        )
        print(f"    by the best of: {', '.join(ratios)}")
    print(
        f"search {rows[0]['seconds']:.0f} s; estimate and measurement correlate by"
        f" {rows[0]['correlation']:.4f}"
    )


if __name__ == "__main__":
    main()
