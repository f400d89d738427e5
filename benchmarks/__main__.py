"""`python -m benchmarks [NAME ...]`: run, print and write them all, or those that are named."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from benchmarks.common import Result, write

NAMES = ("generator", "learner", "driver", "durability", "weight_update", "algorithms", "shared_prefix", "prefix_cache")
TIMEOUT_S = 1200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of timings each")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # this process is to run one, and leave its result
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if options.into is not None:
        [name] = options.names
        result = importlib.import_module(f"benchmarks.{name}").run(options.rounds)
        options.into.write_text(json.dumps([result.name, result.title, result.rows, result.figures]))
        return
    results = [_run(name, options.rounds) for name in options.names or NAMES]
    write(results)
    console = Console()
    for result in results:
        table = Table("", "", "", title=result.title, title_justify="left", show_header=False)
        for row in result.rows:
            table.add_row(*row)
        console.print(table)


def _run(name: str, rounds: int) -> Result:
    """In a process of its own: engines leave threads and environment variables behind."""
    print(f"{name} ...", flush=True)
    with TemporaryDirectory() as directory:
        file = Path(directory) / "result.json"
        command = [sys.executable, "-m", "benchmarks", name, "--rounds", str(rounds), "--into", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # as in a run
        subprocess.run(command, check=True, timeout=TIMEOUT_S, env=environment)
        name, title, rows, figures = json.loads(file.read_text())
    return Result(name, title, tuple(tuple(row) for row in rows), figures)


if __name__ == "__main__":
    main()
