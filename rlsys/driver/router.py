"""Which worker gets a piece of work. Pure: no I/O; the caller passes the time."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class _Worker:
    outstanding: int = 0
    failures: int = 0  # in a row
    not_before: float = -math.inf
    retired: bool = False


class Router:
    """Sends work to the healthy worker with the most free capacity, and never into a failing one.

    A worker is in one of four states:

        absent   not there, or dead: gets nothing until `joined` (again)
        resting  failed `failures` times in a row: gets nothing for `backoff * 2**(failures - 1)` s, at most `longest`
        retired  gets nothing, and goes when its work is done
        ready    gets work while fewer than `capacity` pieces are outstanding (None: no limit)

    Invariants: work goes to ready workers only; outstanding never exceeds capacity nor falls below 0; the choice
    depends on the calls made so far and nothing else (least outstanding first, ties by name).
    """

    def __init__(self, capacity: int | None = None, backoff: float = 1.0, longest: float = 60.0) -> None:
        self.capacity = capacity
        self.backoff = backoff
        self.longest = longest
        self._workers: dict[str, _Worker] = {}

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(sorted(self._workers))

    def outstanding(self, worker: str) -> int:
        return self._workers[worker].outstanding

    def failures(self, worker: str) -> int:
        """Failures in a row."""
        return self._workers[worker].failures

    def joined(self, worker: str) -> None:
        """The worker is there and has no work."""
        if worker in self._workers:
            raise ValueError(f"{worker} is there already")
        self._workers[worker] = _Worker()

    def died(self, worker: str) -> None:
        """The worker is gone, and all of its work with it."""
        self._workers.pop(worker, None)

    def retire(self, worker: str, retired: bool = True) -> None:
        """Give the worker no more work, or (False) think better of it."""
        self._workers[worker].retired = retired

    def failed(self, worker: str, now: float) -> None:
        """A piece of work came back as failed, by the fault of the worker."""
        state = self._release(worker)
        state.failures += 1
        state.not_before = now + min(self.longest, self.backoff * 2.0 ** (state.failures - 1))

    def done(self, worker: str) -> None:
        """A piece of work came back well."""
        state = self._release(worker)
        state.failures = 0
        state.not_before = -math.inf

    def cancelled(self, worker: str) -> None:
        """A piece of work was taken back; this says nothing of the worker."""
        self._release(worker)

    def _release(self, worker: str) -> _Worker:
        state = self._workers[worker]
        if state.outstanding == 0:
            raise ValueError(f"{worker} has no work outstanding")
        state.outstanding -= 1
        return state

    def choose(self, now: float) -> str | None:
        """The worker for one more piece of work, which counts as outstanding from now; None when there is none."""
        ready = [
            (state.outstanding, name)
            for name, state in self._workers.items()
            if self._ready(state, now) and (self.capacity is None or state.outstanding < self.capacity)
        ]
        if not ready:
            return None
        _, name = min(ready)
        self._workers[name].outstanding += 1
        return name

    def choose_idle(self, now: float, pieces: int) -> str | None:
        """A worker without work for so many pieces together, however many that are; None when there is none."""
        idle = [n for n, state in self._workers.items() if self._ready(state, now) and not state.outstanding]
        if not idle:
            return None
        self._workers[min(idle)].outstanding = pieces
        return min(idle)

    @staticmethod
    def _ready(state: _Worker, now: float) -> bool:
        return state.not_before <= now and not state.retired

    def next_change(self, now: float) -> float | None:
        """When the next resting worker becomes ready; None when none is resting."""
        return min((s.not_before for s in self._workers.values() if s.not_before > now), default=None)
