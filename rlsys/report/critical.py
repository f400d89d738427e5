"""Where the time of a step went: its critical path, and who waited for whom.

A step lasts from the end of the one before to its own end. Its path is followed backwards from there: the gradient, and
the batch before it; then, if the learner had to wait, what the reference did, and the way of the group that was waited
for (reward, sampling) up to the weights that opened a place for it; if not, what the learner itself did in between.
Every moment of the step is in one part of the path, so the parts add up to the step: making a part shorter makes the
step shorter.

The times of prompts are the ledger's, those of the learner and of weights the timeline's.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlsys.errors import DataError, RunDirError
from rlsys.ledger.story import Passage, read_passages
from rlsys.report.reading import number
from rlsys.trackers.jsonl import METRICS, read_rows
from rlsys.trackers.timeline import TIMELINE, read_events

NEWEST = 100  # steps that are looked at, where none is asked for
_CLOCKS_S = 0.002  # ledger and timeline have clocks of their own
WAITED_S = 0.001  # a learner that waited for less than this had its batch

# The parts of a path in their order, and whom whoever has to wait then waits for.
STAGES: Mapping[str, str] = {
    "weights": "weights",  # from published to taken by the last generator
    "gate": "driver",  # waiting for a place among the groups that may be started
    "queue for a generator": "generators",
    "sampling": "generators",
    "reward": "rewarders",
    "disk": "driver",
    "queue": "driver",  # complete, and not yet taken by the reference or the learner
    "reference": "reference",
    "batch": "learner",  # collating, advantages
    "gradient": "learner",
    "publish": "learner",
    "checkpoint": "learner",
    "other": "driver",
}


class Span(NamedTuple):
    """What a worker did; seconds since 1970."""

    name: str
    lane: str
    start: float
    end: float


class Part(NamedTuple):
    """A piece of a path; `who` is the worker, or what had to be waited for."""

    stage: str
    start: float
    end: float
    who: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepPath:
    """The critical path of a step; `prompt` is the one that the learner waited for, where it did."""

    step: int
    parts: Sequence[Part]
    prompt: str | None

    @property
    def seconds(self) -> float:
        return self.parts[-1].end - self.parts[0].start if self.parts else 0.0

    def by_stage(self) -> dict[str, float]:
        """Seconds of each stage."""
        return _sums((part.stage, part.seconds) for part in self.parts)

    @property
    def bound(self) -> str:
        """The stage with the most seconds."""
        seconds = self.by_stage()
        return max(seconds, key=seconds.__getitem__, default="other")


@dataclass(frozen=True, slots=True)
class Role:
    """Of all seconds, those in which a worker was at work, and those in which it waited, by whom it waited for."""

    name: str
    seconds: float
    busy: float
    waited: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Steps in rising order. `traced` are ids of prompts of these steps that can be followed in the timeline."""

    paths: Sequence[StepPath]
    roles: Sequence[Role]
    traced: Sequence[str]


def analyse(run_dir: Path, step: int | None = None) -> Analysis:
    """Of a step, or of the newest `NEWEST`. Raises RunDirError, DataError for a step that is not there."""
    if not run_dir.is_dir():
        raise RunDirError(f"{run_dir}: no such run directory")
    path = run_dir / TIMELINE
    if not path.is_file():
        raise RunDirError(f"{run_dir} has no {TIMELINE}: it is no run directory, or trackers.timeline is false there")
    spans, traced = _spans(read_events(path))
    taken = {int(span.name.split()[1]): span for span in spans if re.fullmatch(r"step \d+", span.name)}
    known = sorted(taken)
    if not known:
        raise DataError(f"{path} has no step yet")
    if step is not None and step not in taken:
        raise DataError(f"{path} has no step {step}: its steps are {known[0]} to {known[-1]}")
    chosen = known[-NEWEST:] if step is None else [step]
    passages = read_passages(run_dir, chosen[0], chosen[-1])
    figures = {int(row["step"]): row for row in read_rows(run_dir / METRICS)}
    walk = _Walk(spans, passages)
    paths = [walk.path(i, taken[i], taken[i - 1].end if i - 1 in taken else None, figures.get(i, {})) for i in chosen]
    parts = [part for path_ in paths for part in path_.parts]
    ends = [taken[i].end for i in chosen]
    trained = {
        p.prompt_id for p in passages if p.event == "trained" and any(abs(p.at - end) < _CLOCKS_S for end in ends)
    }
    roles = _roles(parts, spans, passages) if parts else []
    return Analysis(paths, roles, [prompt for prompt in traced if prompt in trained])


def _spans(events: Iterable[Mapping[str, Any]]) -> tuple[list[Span], list[str]]:
    """What workers did, in order of its end; and the prompts that can be followed."""
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    spans = [
        Span(e["name"], lanes.get(e["tid"], ""), e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
        for e in events
        if e["ph"] == "X"
    ]
    traced = dict.fromkeys(e["id"] for e in events if e["ph"] == "b")
    return sorted(spans, key=lambda span: span.end), list(traced)


class _Walk:
    """From the end of a step back to the end of the one before."""

    def __init__(self, spans: Sequence[Span], passages: Sequence[Passage]) -> None:
        self._learner = [s for s in spans if s.lane == "learner" and not s.name.startswith("step ")]
        self._updates = [s for s in spans if s.lane.startswith("generator") and s.name.startswith("update to ")]
        self._published = {s.name.removeprefix("publish "): s for s in spans if s.name.startswith("publish ")}
        self._compared = [s for s in spans if s.lane == "reference" and s.name.startswith("score ")]
        self._compared_ends = [span.end for span in self._compared]
        self._update_ends = [span.end for span in self._updates]
        self._buffered = sorted((p for p in passages if p.event == "buffered"), key=lambda passage: passage.at)
        self._buffered_at = [passage.at for passage in self._buffered]
        self._of: dict[str, list[Passage]] = {}
        for passage in passages:
            self._of.setdefault(passage.prompt_id, []).append(passage)

    def path(self, step: int, span: Span, before: float | None, figures: Mapping[str, Any]) -> StepPath:
        """`before` is the end of the step before; None: the path goes back to where it comes from."""
        way = _Way(span.end, before)
        update = number(figures.get("learner/update_s"))
        if update is not None:
            way.back("gradient", max(span.start, span.end - update), "learner")
            way.back("batch", span.start, "learner")
        way.back("gradient", span.start, "learner")
        own = [s for s in self._learner if s.end <= span.start + _CLOCKS_S and (before is None or s.end > before)]
        waited = number(figures.get("wait/learner_for_rollouts_s"))
        if waited is None:
            waited = span.start - (own[-1].end if own else before or span.start)
        begun = self._reference(way, span.start) if waited > WAITED_S else span.start
        place = self._newest_buffered(begun)
        if waited > WAITED_S and place >= 0:
            prompt = self._buffered[place].prompt_id
            self._prompt(way, prompt, self._buffered_at[place])
        else:
            prompt = None
            for did in reversed(own if before is not None else []):
                way.back("other", did.end)
                way.back(_LEARNER.get(did.name.split()[0], "other"), did.start, "learner")
        way.rest()
        return StepPath(step, way.parts[::-1], prompt)

    def _reference(self, way: _Way, end: float) -> float:
        """Back through what the reference did, for as long as a group waited for it; returns when that began."""
        place = bisect_right(self._compared_ends, end + _CLOCKS_S) - 1
        while place >= 0:
            end = self._compared[place].start
            way.back("queue", self._compared_ends[place])
            way.back("reference", end, "reference")
            place -= 1
            newest = self._newest_buffered(end)
            if place >= 0 and newest >= 0 and self._compared_ends[place] <= self._buffered_at[newest]:
                break  # it was idle until that group came
        return end

    def _newest_buffered(self, until: float) -> int:
        return bisect_right(self._buffered_at, until + _CLOCKS_S) - 1

    def _prompt(self, way: _Way, prompt_id: str, buffered: float) -> None:
        """The way of a prompt from its draw to the buffer: of its last attempt, where there were several."""
        at: dict[str, Passage] = {}
        for passage in self._of[prompt_id]:
            if passage.at <= buffered:
                at[passage.event] = passage
        way.back("queue", buffered, prompt_id)
        stages = (
            ("disk", ("scored",), ""),
            ("reward", ("sampled", "branched"), at["scored"].worker if "scored" in at else ""),
            ("sampling", ("assigned",), at["sampled"].worker if "sampled" in at else ""),
            ("queue for a generator", ("drawn", "drawn again"), ""),
        )
        begun = buffered
        for stage, after, who in stages:
            times = [at[event].at for event in after if event in at]
            if not times:  # an earlier process did it
                return
            begun = max(times)
            way.back(stage, begun, f"{who}, {prompt_id}" if who else prompt_id)
        place = bisect_right(self._update_ends, begun + _CLOCKS_S) - 1
        if place < 0:
            return
        update = self._updates[place]
        way.back("gate", update.end)
        published = self._published.get(update.name.removeprefix("update to "))
        if published is not None and published.end <= update.end:
            way.back("weights", published.end, update.lane)
            way.back("publish", published.start, "learner")


_LEARNER = {"publish": "publish", "copy": "checkpoint", "rebuild": "gradient"}


class _Way:
    """Parts, from the end backwards: each begins where the one after it ends, and none before the floor."""

    def __init__(self, end: float, floor: float | None) -> None:
        self.parts: list[Part] = []
        self._at = end
        self._floor = floor

    def back(self, stage: str, to: float, who: str = "") -> None:
        to = to if self._floor is None else max(to, self._floor)
        if to < self._at:
            self.parts.append(Part(stage, to, self._at, who))
            self._at = to

    def rest(self) -> None:
        if self._floor is not None:
            self.back("other", self._floor)


def _roles(parts: Sequence[Part], spans: Sequence[Span], passages: Sequence[Passage]) -> list[Role]:
    """The learner, generators, reward workers and the reference; a generator that evaluates is at work."""
    work: dict[str, list[tuple[float, float]]] = {"learner": []}
    names = {span.lane for span in spans if span.lane.startswith("generator")}
    work |= {name: [] for name in sorted(names | {p.worker for p in passages if p.event in ("assigned", "scored")})}
    generators = [name for name in work if name.startswith("generator")]
    if any(span.lane == "reference" for span in spans):
        work["reference"] = []
    for span in spans:
        lanes = generators if span.lane == "evaluation" else [span.lane] if span.lane in work else []
        for lane in lanes:
            work[lane].append((span.start, span.end))
    since: dict[str, Passage] = {}
    for passage in passages:
        before = since.get(passage.prompt_id)
        since[passage.prompt_id] = passage
        if before is None:
            continue
        interval = (before.at, passage.at)
        if before.event == "assigned":
            work[before.worker].append(interval)
        elif passage.event == "branched":
            for name in generators:
                work[name].append(interval)
        elif passage.event == "scored":
            work[passage.worker].append(interval)
    end = parts[-1].end
    for passage in since.values():  # still being sampled when the last of the steps ended
        if passage.event == "assigned" and passage.at < end:
            work[passage.worker].append((passage.at, end))
    return [_role(name, _union(intervals), parts) for name, intervals in work.items()]


def _role(name: str, busy: Sequence[tuple[float, float]], parts: Sequence[Part]) -> Role:
    ends = [end for _, end in busy]
    total = 0.0
    waited = []
    for part in parts:
        at_work = 0.0
        for start, end in busy[bisect_right(ends, part.start) :]:
            if start >= part.end:
                break
            at_work += min(end, part.end) - max(start, part.start)
        total += at_work
        waited.append((STAGES[part.stage], part.seconds - at_work))
    return Role(name, sum(part.seconds for part in parts), total, _sums(waited))


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals that do not overlap, in order."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in pairs:
        sums[name] = sums.get(name, 0.0) + value
    return sums
