"""Start-up of the command line beside ``python -c pass``: median wall times and ratios.

    python benchmarks/startup.py [--rounds 15] [--imports] [--json]

The commands run in turn, each in a process of its own, with compiled code cached outside the tree
as it is for an installed package; a round before the first is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

TARGET = 20.0
"""Most times ``python -c pass`` that a command without a model may take."""
CALL = "from quantmill.cli import main; main()"
PASS = "python -c pass"
COMMANDS: dict[str, list[str]] = {
    PASS: ["-c", "pass"],
    "quantmill --version": ["-c", CALL, "--version"],
    "quantmill --help": ["-c", CALL, "--help"],
    "quantmill plan --help": ["-c", CALL, "plan", "--help"],
    "quantmill plugins": ["-c", CALL, "plugins"],
    "quantmill plugins --json": ["-c", CALL, "plugins", "--json"],
}


def time_one(arguments: list[str], environment: dict[str, str]) -> float:
    """Seconds of one run."""
    start = perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        check=True,
    )
    return perf_counter() - start


def imports(environment: dict[str, str], count: int = 25) -> str:
    """The costliest imports of ``quantmill plugins``, own time in microseconds first."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", CALL, "plugins"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    rows = [line.removeprefix("import time:").split("|") for line in lines[1:]]
    rows.sort(key=lambda row: -int(row[0]))
    return "\n".join(f"{int(own):8} {int(total):8} {name}" for own, total, name in rows[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--imports", action="store_true", help="also the costliest imports")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        times: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for counted in [False] + [True] * options.rounds:
            for name, arguments in COMMANDS.items():
                seconds = time_one(arguments, environment)
                if counted:
                    times[name].append(seconds)
        costs = imports(environment) if options.imports else ""
    base = statistics.median(times[PASS])
    rows: list[dict[str, Any]] = [
        {
            "command": name,
            "seconds": statistics.median(runs),
            "spread": [min(runs), max(runs)],
            "ratio": statistics.median(runs) / base,
        }
        for name, runs in times.items()
    ]
    if options.json:
        print(json.dumps({"target": TARGET, "rounds": options.rounds, "commands": rows}, indent=2))
        return
    print(f"{'command':26} {'median':>9}  {'least':>9} {'most':>9}  {'ratio':>6}  of {TARGET:g}")
    for row in rows:
        low, high = row["spread"]
        print(
            f"{row['command']:26} {row['seconds'] * 1000:6.1f} ms  {low * 1000:6.1f} ms"
            f" {high * 1000:6.1f} ms  {row['ratio']:6.1f}"
        )
    if costs:
        print(f"\n{'own us':>8} {'with us':>8} import\n{costs}")


if __name__ == "__main__":
    main()
