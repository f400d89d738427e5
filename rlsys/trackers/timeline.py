"""RUN/timeline.json: what every worker did when, in Chrome's trace format (open it in Perfetto or chrome://tracing).

The file is whole JSON after every flush: new events overwrite its closing bracket, and bring another one, in a single
write. It is sampled: of each kind of event in each lane the first `dense` are kept, then every second of as many again,
then every fourth, so that a long run stays readable.
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

_END = b"\n]\n"


class TimelineTracker:
    """Events are flushed at every step. Times in the file are microseconds since 1970: a resumed run goes on in it."""

    def __init__(self, directory: Path, dense: int = 1000) -> None:
        self._path = directory / "timeline.json"
        self._dense = dense
        self._epoch = time.time() - time.monotonic()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lanes: dict[str, int] = {}
        self._pending: list[dict[str, Any]] = []
        self._empty = self._open()

    def _open(self) -> bool:
        """Make the file, or make what a crash left whole again; True when it holds no event."""
        if not self._path.is_file():
            self._path.write_bytes(b"[" + _END)
            return True
        lines = self._path.read_bytes().split(b"\n")
        events = []
        for line in lines[1:]:
            try:
                events.append(json.loads(line.rstrip(b",")))
            except ValueError:
                break  # the closing bracket, or the half of a line
        aside = self._path.with_name(self._path.name + ".partial")
        aside.write_bytes(
            b"[\n" + b",\n".join(json.dumps(e).encode() for e in events) + _END if events else b"[" + _END
        )
        os.replace(aside, self._path)
        for event in events:
            if event["ph"] == "M" and event["name"] == "thread_name":
                self._lanes[event["args"]["name"]] = event["tid"]
        return not events

    def event(self, name: str, start: float, end: float, lane: str) -> None:
        count = self._seen[lane, name]
        self._seen[lane, name] += 1
        if count % (1 << (count // self._dense)):
            return
        if lane not in self._lanes:
            self._lanes[lane] = len(self._lanes)
            names = {"name": lane}
            self._pending.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": self._lanes[lane], "args": names})
        self._pending.append(
            {
                "ph": "X",
                "name": name,
                "pid": 0,
                "tid": self._lanes[lane],
                "ts": round((start + self._epoch) * 1e6),
                "dur": round((end - start) * 1e6),
            }
        )

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
