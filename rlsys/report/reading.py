"""A run directory as it is, with whatever is wrong with it."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlsys.config.identity import flatten
from rlsys.config.source import read_yaml
from rlsys.errors import ConfigError, RlsysError, RunDirError
from rlsys.ledger.story import LEDGER_FILE, ROUTINE, Event, RunStory, read_lengths, read_run
from rlsys.report.evaluations import Evaluations, read_evaluations
from rlsys.report.samples import Samples, read_samples
from rlsys.trackers.jsonl import EVALS, METRICS, SUMMARY

CONFIG = "config.yaml"
_ANY_OF = (CONFIG, METRICS, EVALS, SUMMARY, LEDGER_FILE, "rollouts")


@dataclass(frozen=True, slots=True)
class Run:
    """What is there of a run.

    `config` has dotted keys. `steps` and `evals` are the rows of metrics.jsonl and evals.jsonl, in rising order of
    `step`. Empty, or None, where a file is missing or damaged; then `problems` says so.
    """

    path: Path
    label: str  # tells it from the other runs of the report
    config: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    story: RunStory | None
    lengths: Mapping[int, Mapping[int, int]]  # step -> length in tokens -> responses
    samples: Samples
    evaluations: Evaluations
    written: float | None  # when its figures were last written, seconds since 1970
    problems: Sequence[str]

    @property
    def name(self) -> str:
        return str(self.config.get("run.name", self.label))

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def state(self) -> str:
        """`ended after step 120`, or how far it is. A run that went on after it had been stopped has an old summary."""
        planned = self.config.get("run.steps")
        of = f" of {planned}" if planned else ""
        if self.summary is not None and self.summary.get("steps") == self.last_step:
            whole = self.last_step >= (number(planned) or 0)
            return f"ended after step {self.last_step}" if whole else f"stopped at step {self.last_step}{of}"
        ago = "" if self.written is None else f", written {_duration(max(0.0, time.time() - self.written))} ago"
        return f"at step {self.last_step}{of}: going on, or ended without a summary{ago}"

    @property
    def fates(self) -> Mapping[str, Any] | None:
        """`{"trained": 640, "dropped": {"zero variance": 3}, "pending": 64}`."""
        if self.story is not None:
            return self.story.fates
        found = (self.summary or {}).get("fates")
        return found if isinstance(found, Mapping) and {"trained", "dropped", "pending"} <= found.keys() else None

    @property
    def incidents(self) -> list[Event]:
        return [note for note in self.story.notes if note.event not in ROUTINE] if self.story else []

    @property
    def wall_s(self) -> float | None:
        """Seconds in steps, and from the start to the end where there is a summary of these steps."""
        if self.summary is not None and self.summary.get("steps") == self.last_step:
            return number(self.summary.get("wall_s"))
        times = [found for row in self.steps if (found := number(row.get("time/step_s"))) is not None]
        return sum(times) if times else None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs, in order. Raises RunDirError for what is no run directory, and for one that is given twice."""
    again = [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if again:
        raise RunDirError(f"{again[0]} is given twice: each run once")
    runs = [_read(path) for path in paths]
    return [replace(run, label=label) for run, label in zip(runs, _labels(paths), strict=True)]


def _read(path: Path) -> Run:
    if not path.is_dir():
        raise RunDirError(f"{path}: no such run directory")
    if not any((path / name).exists() for name in _ANY_OF):
        raise RunDirError(f"{path} is no run directory: it has none of {', '.join(_ANY_OF)}")
    problems: list[str] = []
    config: Mapping[str, Any] = {}
    try:
        config = flatten(read_yaml(path / CONFIG).values)
    except ConfigError as error:
        problems.append(f"{error}; the run is shown as a group of its own, without its config")
    steps = _rows(path / METRICS, problems)
    evals = _rows(path / EVALS, problems, needed=False)
    story: RunStory | None = None
    lengths: Mapping[int, Mapping[int, int]] = {}
    unknown = "fates, the distribution of lengths and incidents are left out"
    if (path / LEDGER_FILE).exists():
        try:
            story, lengths = read_run(path), read_lengths(path)
        except (RlsysError, ValueError) as error:  # JSON's errors are ValueErrors
            problems.append(f"{error}; {unknown}")
    else:
        problems.append(f"{path / LEDGER_FILE} is missing: {unknown}")
    samples, evaluations = read_samples(path, problems), read_evaluations(path, problems)
    return Run(
        *(path, path.name, config, steps, evals, _summary(path / SUMMARY, problems), story, lengths),
        *(samples, evaluations),
        written=(path / METRICS).stat().st_mtime if (path / METRICS).is_file() else None,
        problems=problems,
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    whole = [path.resolve() for path in paths]
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        labels = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in whole]


def _rows(path: Path, problems: list[str], needed: bool = True) -> list[dict[str, Any]]:
    """Lines that cannot be read are left out, each step is there once; the half of a last line is being written."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        if needed:
            problems.append(f"{path} is missing: there are no curves of this run")
        return []
    except OSError as error:
        problems.append(f"{path} cannot be read: {error}")
        return []
    rows: dict[int, dict[str, Any]] = {}
    damaged = []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged.append(place)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        problems.append(f"{path} is damaged: {len(damaged)} of {len(lines)} lines are left out (line {shown})")
    return [rows[step] for step in sorted(rows)]


def _summary(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """None while there is none: a run writes it at its end."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path} is damaged, and left out: {error}")
        return None
    return found


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
