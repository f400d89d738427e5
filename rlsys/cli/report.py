"""`rlsys report`: one HTML page of one run or of several."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rlsys.durable import writing
from rlsys.errors import RunDirError
from rlsys.report.reading import read_runs


def report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the page; says what of the runs is missing or damaged.

    Raises RunDirError for what is no run directory, and when the page cannot be written.
    """
    runs = read_runs(run_dirs)
    from rlsys.report.page import render  # plotly takes a second to load, which mistakes are not made to wait for

    content = render(runs).encode("utf-8", "replace")
    aside = out.with_name(f"{out.name}.partial")
    try:
        with writing(out):
            aside.write_bytes(content)
            os.replace(aside, out)
    except OSError as error:
        raise RunDirError(f"--out: {out} cannot be written: {error}") from error
    for run in runs:
        for problem in run.problems:
            print(f"rlsys: {run.label}: {problem}", file=sys.stderr)
    groups = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{out}: {groups}, {len(content) / 1e6:.1f} MB; any browser opens it, without a network")
