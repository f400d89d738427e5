"""One tracker in front of many: a tracker that fails is named once, then left out; the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.config.models import Config
from rlsys.roles import SampleRow, Tracker
from rlsys.trackers import TrackerError
from rlsys.trackers.console import ConsoleTracker
from rlsys.trackers.jsonl import JsonlTracker
from rlsys.trackers.prometheus import PrometheusTracker
from rlsys.trackers.repository import git_state
from rlsys.trackers.tensorboard import TensorboardTracker
from rlsys.trackers.timeline import TimelineTracker
from rlsys.trackers.wandb import WandbTracker, resolve_mode


class Trackers:
    """Hands every call on to all of its trackers, in order.

    What a tracker may fail of is the world outside: its service, its network (TrackerError), the disk (OSError). Such a
    tracker is reported through `warn`, kept in `failed` with its message, and not called again. Every other exception
    is a mistake in the program and passes through.
    """

    def __init__(self, trackers: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self._live = dict(trackers)
        self._warn = warn
        self.failed: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Those that have not failed."""
        return list(self._live)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log_step(step, metrics))

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        self._each(lambda tracker: tracker.log_eval(step, metrics, scores))

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._each(lambda tracker: tracker.log_samples(step, rows))

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        self._each(lambda tracker: tracker.event(name, start, end, lane, trace))

    def incident(self, title: str, text: str) -> None:
        self._each(lambda tracker: tracker.incident(title, text))

    def resumed(self, step: int) -> None:
        self._each(lambda tracker: tracker.resumed(step))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.finish(summary))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._live.items()):
            try:
                call(tracker)
            except (TrackerError, OSError) as error:
                del self._live[name]
                self.failed[name] = str(error)
                self._warn(f"tracker {name} failed and is left out from here on; the run goes on: {error}")


def open_trackers(config: Config, run_dir: Path, console: ConsoleTracker) -> Trackers:
    """The trackers that the config asks for; the console comes last, so that what it points to is there.

    One that does not start is reported, and the run goes on without it.
    """
    asked, options = config.trackers, config.trackers.wandb
    trackers: dict[str, Tracker] = {"jsonl": JsonlTracker(run_dir)}

    def add(name: str, start: Callable[[], Tracker | None]) -> None:
        try:
            tracker = start()
        except TrackerError as error:
            console.warn(f"tracker {name} failed and is left out; the run goes on: {error}")
        else:
            if tracker is not None:
                trackers[name] = tracker

    def wandb() -> Tracker | None:
        mode = resolve_mode(options.mode, os.environ)
        if mode == "disabled":
            return None
        tracker = WandbTracker(
            run_dir,
            name=config.run.name,
            project=options.project,
            entity=options.entity,
            group=options.group,
            job_type=options.job_type,
            tags=options.tags,
            mode=mode,
            config={**config.model_dump(mode="json"), "git": git_state(Path.cwd())},
            log_model=options.log_model,
        )
        if tracker.warning is not None:
            console.warn(tracker.warning)
        return tracker

    if asked.timeline:
        trackers["timeline"] = TimelineTracker(run_dir)
    add("wandb", wandb)
    if asked.tensorboard:
        add("tensorboard", lambda: TensorboardTracker(run_dir))
    if asked.prometheus is True or (asked.prometheus == "auto" and config.resources.ray_address is not None):
        add("prometheus", lambda: PrometheusTracker(config.run.name))
    trackers["console"] = console
    return Trackers(trackers, console.warn)
