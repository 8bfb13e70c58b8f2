"""One command per table: us and the peers in turn, in one process tree.

    python -m benchmarks                       the tables, and the peers that are here
    python -m benchmarks load [--quick] [--json FILE] [--page FILE] [--repeats 3]
    python -m benchmarks quality --peer-python PEER/bin/python --llama-cpp BUILD/bin

Every script runs as a child process, one after another; what it says is collected. README.md tells
how to read the tables and how to set the peers up.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.grids import grids, merged, page, text
from benchmarks.tables import LIBRARIES, TABLES, Step

FOLDER = Path(__file__).resolve().parent
QUIET = 0.5
"""Load average below which nothing else runs to speak of."""
PEER_PYTHON, LLAMA_CPP = "QUANTMILL_PEER_PYTHON", "QUANTMILL_LLAMA_CPP"


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def find_peers(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Name to version, or to why it is absent; one that was given and isn't there is an error."""
    found: dict[str, Any] = {}
    for name in LIBRARIES:
        try:
            found[name] = {"version": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            found[name] = {"absent": "not installed beside quantmill"}
    found["GPTQModel"] = {"absent": f"no --peer-python, no {PEER_PYTHON}"}
    if options.peer_python:
        asked = "import importlib.metadata as m; print(m.version('gptqmodel'))"
        version = output_of(options.peer_python, "-c", asked)
        if version is None:
            parser.error(f"--peer-python: {options.peer_python} has no GPTQModel")
        found["GPTQModel"] = {"version": version}
    found["llama.cpp"] = {"absent": f"no --llama-cpp, no {LLAMA_CPP}"}
    if options.llama_cpp:
        if not (options.llama_cpp / "llama-bench").exists():
            parser.error(f"--llama-cpp: {options.llama_cpp} has no llama-bench")
        libraries = sorted(path.name for path in options.llama_cpp.glob("libggml.so.*.*.*"))
        found["llama.cpp"] = {"version": libraries[-1] if libraries else "unknown"}
    return found


def cuda() -> dict[str, str]:
    """The device, as a peer is described; asked in a child, which may take the device."""
    asked = "import torch; print(torch.cuda.get_device_name())"
    name = output_of(sys.executable, "-c", asked)
    return {"version": name} if name else {"absent": "no CUDA device"}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "load average": round(os.getloadavg()[0], 2),
    }


def parsed(output: str) -> Any:
    """A script's JSON: one document, or one a line."""
    try:
        return json.loads(output)
    except json.JSONDecodeError:
        return [json.loads(line) for line in output.splitlines() if line.strip()]


def call(command: list[str], work: Path, written: Path | None) -> tuple[Any, str]:
    """A script's results, or None and the end of what it said; its progress goes to stderr.

    It runs in the work folder, where a peer may leave its logs.
    """
    said: deque[str] = deque(maxlen=25)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE if written else printed,
            stderr=subprocess.STDOUT if written else subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=work,
        )
        with child:
            for line in (child.stdout if written else child.stderr) or ():
                said.append(line)
                sys.stderr.write(line)
                sys.stderr.flush()
        if child.returncode:
            return None, f"exit {child.returncode}\n{''.join(said)}".strip()
        printed.seek(0)
        output = written.read_text(encoding="utf-8") if written else printed.read()
    try:
        return parsed(output), ""
    except json.JSONDecodeError as error:
        return None, f"no JSON: {error}"


def arguments(step: Step, peers: dict[str, Any], *, quick: bool) -> list[str]:
    """With the placeholders still in."""
    found = [*step.arguments, *(step.quick if quick else step.full)]
    for name, more in step.beside.items():
        found += more if "version" in peers[name] else ()
    return found


def start(step: Step, peers: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """A step's record before it ran."""
    missing = [name for name in step.needs if "absent" in peers[name]]
    record: dict[str, Any] = {
        "title": step.title,
        "reading": step.reading,
        "script": step.script,
        "arguments": arguments(step, peers, quick=quick),
        "ratios": step.ratios,
        "absent": [name for name in step.beside if "absent" in peers[name]],
        "status": "not yet run",
        "why": "",
    }
    if missing:
        why = "; ".join(f"{name} is absent ({peers[name]['absent']})" for name in missing)
        record |= {"status": "not run", "why": why}
    return record


def run(table: str, options: argparse.Namespace, peers: dict[str, Any], work: Path) -> int:
    """All steps in turn, as often as asked; 1 where one failed."""
    quick = options.quick
    steps = [step for step in TABLES[table] if not options.only or step.script in options.only]
    if any("CUDA" in step.needs for step in steps):
        peers["CUDA"] = cuda()
    named = {name for step in steps for name in (*step.beside, *step.needs)}
    document: dict[str, Any] = {
        "table": table,
        "quick": quick,
        "repeats": options.repeats,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "peers": {name: found for name, found in peers.items() if name in named},
        "notes": [],
        "steps": [start(step, peers, quick=quick) for step in steps],
    }
    if quick:
        document["notes"].append(
            "Quick run: it shows that the table works; its figures don't count."
        )
    if document["machine"]["load average"] > QUIET:
        document["notes"].append(
            f"Not a quiet machine: the load average was {document['machine']['load average']}"
            " before the first step. Times are not to be quoted."
        )
    for note in document["notes"]:
        print(note, file=sys.stderr)
    places = {
        "{work}": str(work),
        "{gptqmodel}": str(options.peer_python),
        "{llama}": str(options.llama_cpp),
    }
    results: list[list[Any]] = [[] for _ in steps]
    for turn in range(options.repeats):
        for record, runs in zip(document["steps"], results, strict=True):
            if record["status"] not in ("not yet run", "ran"):
                continue
            written = work / "results.json" if "{json}" in record["arguments"] else None
            given = record["arguments"]
            for place, value in {**places, "{json}": str(written)}.items():
                given = [one.replace(place, value) for one in given]
            command = [sys.executable, str(FOLDER / record["script"]), *given]
            of = f" ({turn + 1} of {options.repeats})" if options.repeats > 1 else ""
            print(f"== {record['title']}{of}: {shlex.join(command[1:])}", file=sys.stderr)
            record["load_before"] = os.getloadavg()[0]
            began = time.perf_counter()
            found, why = call(command, work, written)
            record["seconds"] = time.perf_counter() - began
            if why:
                record |= {"status": "failed", "why": why}
            else:
                runs.append(found)
                record |= {"status": "ran", "results": merged(runs)}
            save(document, options)
    save(document, options)
    show(document)
    return int(any(record["status"] == "failed" for record in document["steps"]))


def save(document: dict[str, Any], options: argparse.Namespace) -> None:
    """After every step, so that an interrupted run keeps what it has."""
    files = {options.json: json.dumps(document, indent=2) + "\n", options.page: page(document)}
    for path, words in files.items():
        if path:
            part = path.with_name(path.name + ".part")
            part.write_text(words, encoding="utf-8")
            part.replace(path)


def show(document: dict[str, Any]) -> None:
    for record in document["steps"]:
        print(f"\n{record['title']}\n{record['reading']}")
        if record["status"] != "ran":
            print(f"{record['status']}: {record['why']}")
            continue
        if record["absent"]:
            print(f"absent here: {', '.join(record['absent'])}")
        for grid in grids(record["results"]):
            print("\n" + text(grid))
    for name, found in document["peers"].items():
        print(f"{name}: {found.get('version') or 'absent, ' + found['absent']}")


def listing(peers: dict[str, Any]) -> None:
    for table, steps in TABLES.items():
        print(table)
        for step in steps:
            beside = f", beside {', '.join(step.beside)}" if step.beside else ""
            print(f"  {step.title} ({step.script}){beside}")
    print("peers")
    for name, found in peers.items():
        print(f"  {name}: {found.get('version') or 'absent, ' + found['absent']}")


def file(words: str) -> Path:
    """A file that can be written."""
    path = Path(words).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{words}: no file in a folder that is there")
    return path


def count(words: str) -> int:
    if not words.isdigit() or not int(words):
        raise argparse.ArgumentTypeError(f"{words}: not a count of at least 1")
    return int(words)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", nargs="?", choices=[*TABLES], help="none: list them")
    parser.add_argument("--quick", action="store_true", help="small: shows that it works")
    parser.add_argument("--repeats", type=count, default=1, help="runs of the whole table")
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", help="of the table, like plan.py")
    parser.add_argument("--json", type=file, metavar="FILE")
    parser.add_argument("--page", type=file, metavar="FILE", help="self-contained HTML")
    parser.add_argument("--work", type=Path, help="folder to keep fabricated models in")
    parser.add_argument(
        "--peer-python",
        default=os.environ.get(PEER_PYTHON),
        help=f"interpreter of an environment with GPTQModel (or {PEER_PYTHON})",
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=os.environ.get(LLAMA_CPP),
        metavar="DIR",
        help=f"folder of llama.cpp's programs and libraries (or {LLAMA_CPP})",
    )
    options = parser.parse_args()
    if options.peer_python and (found := shutil.which(options.peer_python)):
        options.peer_python = str(Path(found).absolute())
    if options.llama_cpp:
        options.llama_cpp = options.llama_cpp.absolute()
    peers = find_peers(options, parser)
    if not options.table:
        listing(peers)
        return 0
    scripts = {step.script for step in TABLES[options.table]}
    if unknown := sorted(set(options.only or ()) - scripts):
        parser.error(f"--only: {', '.join(unknown)} not in {options.table}: {sorted(scripts)}")
    if options.work:
        work = options.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        return run(options.table, options, peers, work)
    with tempfile.TemporaryDirectory() as folder:
        return run(options.table, options, peers, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
