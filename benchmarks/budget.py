"""Mixed precision under a budget beside every method alone: KL divergence at the same bytes.

    python benchmarks/budget.py WORK_FOLDER [--model models/novella] [--budgets 4.25 3.5 3.0]
        [--methods "gptq-2;gptq-3;gptq-4;gptq-8"] [--windows 40] [--json]

The search runs on the calibration text, KL is measured on the held-out text. Methods alone are
calibrated on all windows, as the mixtures in the end are (the search holds some of them back).
What the best uniform methods have at a budget is interpolated between any two of them, in KL (what
a random mixture of them would have) and in its logarithm (which asks more). Seconds are those of
the search: every method alone, the sensitivities, the allocation. Methods that lie in WORK_FOLDER
from an earlier run are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import quantmill
from quantmill.budget.choices import Budget
from quantmill.budget.search import BudgetSearch
from quantmill.judging import Judge

ROOT = Path(__file__).resolve().parents[1]
METHODS = (
    "gptq-2;gptq-3:sym=false;gptq-3:group_size=-1,sym=false;gptq-4;gptq-4:group_size=64;"
    "gptq-4:group_size=-1,sym=false;gptq-5:group_size=-1,sym=false"
)
"""Groups of a whole row spare more bytes than they cost; 5 bits stand between 4 and 8."""


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
    uniform = []
    for number, label in enumerate(search.methods):
        folder = options.work / f"uniform-{number}"
        if not folder.exists():
            quantmill.quantize(options.model, folder, label, calibration=calibration, **shared)
        mean, error = kl(folder)
        bits = search.choices.bits(search.choices.uniform(label))
        uniform.append({"method": label, "bits": bits, "kl": mean, "stderr": error})
    points = [(item["bits"], item["kl"]) for item in uniform]
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
                    "ratio": mean / interpolated(points, report.bits, logarithm=False),
                    "ratio_log": mean / interpolated(points, report.bits, logarithm=True),
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
            f" +- {row['stderr']:.5f} (estimated {row['estimated']:.5f})  {row['ratio']:.3f} of the"
            f" uniform ones, {row['ratio_log']:.3f} in logarithms  {row['quant_method']}"
            f" {row['counts']}"
        )
    print(
        f"search {rows[0]['seconds']:.0f} s; estimate and measurement correlate by"
        f" {rows[0]['correlation']:.4f}"
    )


if __name__ == "__main__":
    main()
