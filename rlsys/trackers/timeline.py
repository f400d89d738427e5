"""RUN/timeline.json: what every worker did when, in Chrome's trace format (open it in Perfetto or chrome://tracing).

The file is whole JSON after every flush: new events overwrite its closing bracket, and bring another one, in a single
write. It is sampled: of each kind of event in each lane the first `dense` are kept, then every second of as many again,
then every fourth, so that a long run stays readable.

The way of a prompt is a row of its own there: its stages are asynchronous events that share its id; a search finds it.
Prompts are sampled in the same way, each with all of its stages or none.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.roles import SampleRow

TIMELINE = "timeline.json"
_END = b"\n]\n"


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a timeline, in order; those before the damage, where a crash or a disk has left some."""
    events: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[1:]:
        try:
            event = json.loads(line.rstrip(b","))
        except ValueError:
            break  # the closing bracket, or the half of a line
        events.append(event)
    return events


class TimelineTracker:
    """Events are flushed at every step. Times in the file are microseconds since 1970: a resumed run goes on in it."""

    def __init__(self, directory: Path, dense: int = 1000) -> None:
        self._path = directory / TIMELINE
        self._dense = dense
        self._epoch = time.time() - time.monotonic()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._traces: dict[str, bool] = {}  # prompts that have been heard of, and whether they are kept
        self._lanes: dict[str, int] = {}
        self._pending: list[dict[str, Any]] = []
        self._empty = self._open()

    def _open(self) -> bool:
        """Make the file, or make what a crash left whole again; True when it holds no event."""
        if not self._path.is_file():
            self._path.write_bytes(b"[" + _END)
            return True
        events = read_events(self._path)
        aside = self._path.with_name(self._path.name + ".partial")
        aside.write_bytes(
            b"[\n" + b",\n".join(json.dumps(e).encode() for e in events) + _END if events else b"[" + _END
        )
        os.replace(aside, self._path)
        for event in events:
            if event["ph"] == "M" and event["name"] == "thread_name":
                self._lanes[event["args"]["name"]] = event["tid"]
        return not events

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        if not (self._keeps_trace(trace) if trace else self._keeps(name, lane)):
            return
        if lane not in self._lanes:
            self._lanes[lane] = len(self._lanes)
            names = {"name": lane}
            self._pending.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": self._lanes[lane], "args": names})
        common = {"name": name, "pid": 0, "tid": self._lanes[lane]}
        begin, end = round((start + self._epoch) * 1e6), round((end + self._epoch) * 1e6)
        if trace:
            traced = {**common, "cat": "prompt", "id": trace}
            self._pending.append({"ph": "b", **traced, "ts": begin, "args": {"prompt": trace, "worker": lane}})
            self._pending.append({"ph": "e", **traced, "ts": end})
        else:
            self._pending.append({"ph": "X", **common, "ts": begin, "dur": end - begin})

    def _keeps(self, name: str, lane: str) -> bool:
        self._seen[lane, name] += 1
        return self._thinned(self._seen[lane, name] - 1)

    def _keeps_trace(self, trace: str) -> bool:
        if trace not in self._traces:
            self._traces[trace] = self._thinned(len(self._traces))
        return self._traces[trace]

    def _thinned(self, count: int) -> bool:
        """Whether the one after so many others is kept."""
        return count % (1 << (count // self._dense)) == 0

    def flush(self) -> None:
        """Append the pending events in one write."""
        if not self._pending:
            return
        text = b",\n".join(json.dumps(event).encode() for event in self._pending)
        self._pending.clear()
        with self._path.open("r+b", buffering=0) as file:
            file.seek(-len(_END), os.SEEK_END)
            file.write((b"\n" if self._empty else b",\n") + text + _END)
        self._empty = False

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.flush()

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        self.flush()

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Samples have no duration."""

    def incident(self, title: str, text: str) -> None:
        now = time.monotonic()
        self.event(title, now, now, "incidents")
        self.flush()

    def resumed(self, step: int) -> None:
        """What was done and lost did take its time: it stays."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.flush()
