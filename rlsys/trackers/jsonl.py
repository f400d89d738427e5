"""RUN/metrics.jsonl, one line per learner step, RUN/evals.jsonl, one line per evaluation, and RUN/summary.json.

A resumed run does some steps again: their earlier lines are taken out, so that each step is there once. A line that a
crash left half-written is taken out when the file is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.roles import SampleRow
from rlsys.trackers import TrackerError

METRICS, EVALS, SUMMARY = "metrics.jsonl", "evals.jsonl", "summary.json"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, in order; empty when there is no file. A half-written last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


class JsonlTracker:
    """Writes each line when it comes: what was logged is on disk."""

    def __init__(self, directory: Path) -> None:
        self._metrics = _StepFile(directory / METRICS)
        self._evals = _StepFile(directory / EVALS)
        self._summary = directory / SUMMARY

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.write(step, metrics)

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        self._evals.write(step, metrics)

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Samples are in the rollout store."""

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        """Events are in the timeline."""

    def incident(self, title: str, text: str) -> None:
        """Incidents are in the ledger."""

    def resumed(self, step: int) -> None:
        self._metrics.keep_before(step + 1)
        self._evals.keep_before(step + 1)

    def finish(self, summary: Mapping[str, Any]) -> None:
        _replace(self._summary, json.dumps(summary, indent=2) + "\n")


class _StepFile:
    """Lines in rising order of their `step`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = -1
        self.keep_before(None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step <= self._last:
            self.keep_before(step)
        try:
            line = json.dumps({"step": step, **values}, allow_nan=False)
        except ValueError as error:
            odd = [name for name, value in values.items() if value != value or abs(value) == float("inf")]
            raise TrackerError(f"{self._path.name}: step {step}: {', '.join(odd)} is not finite") from error
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._last = step

    def keep_before(self, step: int | None) -> None:
        """Take out the lines of `step` and later (None: only what is half-written), aside and then renamed."""
        rows = read_rows(self._path)
        kept = [row for row in rows if step is None or row["step"] < step]
        self._last = max((row["step"] for row in kept), default=-1)
        if not self._path.is_file():
            return
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if text.encode() == self._path.read_bytes():
            return
        _replace(self._path, text)


def _replace(path: Path, text: str) -> None:
    """Write aside, then rename: the file is whole at any time."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
