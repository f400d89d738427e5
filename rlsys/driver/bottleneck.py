"""Which stage a step waited for. Pure: no clock, no I/O.

    |<------------------------ a step ------------------------->|
    | learner: publish |   the learner waits for a batch  | learner: step |
                              [ ... generation ... ][ reward ][after]     the group that came last, and ended the wait

While a batch is waited for, the time belongs to what the group was doing whose arrival ended the wait: had that stage
been faster, the wait would have been shorter. If that group was admitted in the place of a dropped one, the time before
belongs to what the dropped one was doing, and so on. docs/metrics.md says the same to users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["generation", "reward", "after"]  # after: the disk
Span = tuple[float, float]  # seconds of one clock

STAGES = ("generation", "reward", "learner")


@dataclass(frozen=True, slots=True)
class Passage:
    """A group's way: the stages that it entered, each with the time, rising; at least one. Times are seconds."""

    stages: tuple[tuple[Stage, float], ...]
    ended: float  # when it was finished or dropped
    dropped: bool = False

    @property
    def started(self) -> float:
        return self.stages[0][1]

    def spans(self) -> Iterator[tuple[Stage, Span]]:
        ends = [*(time for _, time in self.stages[1:]), self.ended]
        for (stage, start), end in zip(self.stages, ends, strict=True):
            yield stage, (start, end)


def shares(step: Span, waits: Sequence[Span], learner: Sequence[Span], passages: Sequence[Passage]) -> dict[str, float]:
    """Shares of the step's time that belong to each of `STAGES`: each 0 to 1, together at most 1; none of no time.

    `waits` are those for a batch, which do not overlap; `learner` is when the learner was busy; `passages` are the
    groups that were finished or dropped since the step before.
    """
    total = step[1] - step[0]
    if total <= 0:
        return {}
    spent = dict.fromkeys(STAGES, 0.0)
    clipped = [wait for start, end in waits if (wait := _common((start, end), step))]
    for wait in clipped:
        for stage, (start, end) in _awaited(wait, passages):
            if stage in spent:
                spent[stage] += end - start
    for busy in _union([span for one in learner if (span := _common(one, step))]):
        spent["learner"] += busy[1] - busy[0] - sum(c[1] - c[0] for w in clipped if (c := _common(busy, w)))
    return {stage: min(1.0, max(0.0, seconds / total)) for stage, seconds in spent.items()}


def _awaited(wait: Span, passages: Sequence[Passage]) -> Iterator[tuple[Stage, Span]]:
    """What the wait was for, from its end backwards."""
    start, until = wait
    arrived = sorted((p for p in passages if start < p.ended <= until), key=lambda p: p.ended)
    last = arrived.pop() if arrived else None
    while last is not None:
        for stage, span in last.spans():
            if common := _common(span, (start, until)):
                yield stage, common
        until = min(until, last.started)
        last = None
        while last is None and arrived:
            before = arrived.pop()
            if before.dropped and before.ended <= until:
                last = before


def _common(one: Span, other: Span) -> Span | None:
    start, end = max(one[0], other[0]), min(one[1], other[1])
    return (start, end) if end > start else None


def _union(spans: Sequence[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out
