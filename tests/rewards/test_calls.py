"""The call queue, run against a simulated child whose every move is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.rewards.calls import Call, CallQueue

TIMEOUT = 1.0


@dataclass(frozen=True)
class Behaviour:
    """What a call does `after` seconds.

    "ok" answers, "hang" blocks its lane for ever, "lock" the whole process, "die" ends the process, and "slow" (async
    only) would go on waiting, so that the child cancels it at the time-out.
    """

    is_async: bool
    kind: str
    after: float

    @property
    def guilty(self) -> bool:
        return self.kind in ("hang", "lock", "die")


class Child:
    """One life of a child process, in virtual time."""

    def __init__(self, behaviours: list[Behaviour]) -> None:
        self.behaviours = behaviours
        self.plain: list[Call] = []
        self.plain_since = 0.0
        self.asyncs: dict[Call, float] = {}
        self.async_blocked = False

    def send(self, calls: list[Call], now: float) -> None:
        for call in calls:
            if self.behaviours[call.sample].is_async:
                self.asyncs[call] = now
            else:
                if not self.plain:
                    self.plain_since = now
                self.plain.append(call)

    def next_event(self) -> tuple[float, Call | None]:
        """When what happens next, and by whose doing."""
        events: list[tuple[float, Call]] = []
        if self.plain:
            behaviour = self.behaviours[self.plain[0].sample]
            if behaviour.kind != "hang":
                events.append((self.plain_since + behaviour.after, self.plain[0]))
        if not self.async_blocked:
            for call, since in self.asyncs.items():
                behaviour = self.behaviours[call.sample]
                events.append((since + (TIMEOUT if behaviour.kind == "slow" else behaviour.after), call))
        return min(events, default=(math.inf, None))


def simulate(behaviours: list[Behaviour], concurrency: int) -> list[str]:
    """The fate of each call: "answered", or "given up"."""
    queue = CallQueue(lambda f: f == 1, TIMEOUT, concurrency)
    calls = [Call(0, i, int(b.is_async)) for i, b in enumerate(behaviours)]
    fates: dict[Call, str] = {}
    queue.add(0, calls)
    child, now, locked = Child(behaviours), 0.0, False
    for _ in range(50 * len(calls) + 50):
        if len(fates) == len(calls):
            assert not queue.waiting
            assert queue.sent == 0
            return [fates[call] for call in calls]
        sent = queue.take(now)
        child.send(sent, now)
        assert len(child.asyncs) <= concurrency
        at, call = (math.inf, None) if locked else child.next_event()
        deadline = queue.deadline()
        assert deadline is not None, "calls are waiting, but nothing was sent"
        dead = at > deadline
        now = min(at, deadline)
        if call is not None and not dead:
            behaviour = behaviours[call.sample]
            if behaviour.kind in ("ok", "slow"):
                queue.done(call, now)
                fates[call] = "answered"
                if behaviour.is_async:
                    del child.asyncs[call]
                else:
                    child.plain.pop(0)
                    child.plain_since = now
                continue
            if behaviour.kind == "hang":
                child.async_blocked = True
                continue
            if behaviour.kind == "lock":
                locked = True
                continue
        for given_up in queue.lost(now, killed=dead):
            assert given_up not in fates
            fates[given_up] = "given up"
        child, locked = Child(behaviours), False
    raise AssertionError("no progress")


@st.composite
def behaviour(draw: st.DrawFn) -> Behaviour:
    is_async = draw(st.booleans())
    kinds = ["ok", "ok", "ok", "hang", "lock", "die"] + (["slow"] if is_async else [])
    return Behaviour(is_async, draw(st.sampled_from(kinds)), draw(st.floats(0.0, 0.95)))


@settings(max_examples=200, deadline=None)
@given(st.lists(behaviour(), min_size=1, max_size=12), st.integers(1, 5))
def test_exactly_the_guilty_are_given_up(behaviours: list[Behaviour], concurrency: int) -> None:
    expected = ["given up" if b.guilty else "answered" for b in behaviours]
    assert simulate(behaviours, concurrency) == expected


def test_an_answer_that_came_before_the_kill_clears_the_call() -> None:
    queue = CallQueue(lambda f: False, TIMEOUT, 1)
    queue.add(0, [Call(0, 0, 0), Call(0, 1, 0)])
    queue.take(0.0)
    queue.done(Call(0, 0, 0), at=0.9)  # read late: the kill at 1.0 was for nothing
    assert queue.lost(1.0, killed=True) == []
    assert queue.take(2.0) == [Call(0, 1, 0)]


def test_a_dropped_job_is_not_run_again() -> None:
    queue = CallQueue(lambda f: False, TIMEOUT, 1)
    queue.add(0, [Call(0, 0, 0), Call(0, 1, 0)])
    queue.add(1, [Call(1, 0, 0)])
    queue.take(0.0)
    queue.drop(0)
    assert queue.lost(5.0, killed=True) == [Call(0, 0, 0)]
    assert queue.take(5.0) == [Call(1, 0, 0)]


def test_an_answer_out_of_turn_is_an_error() -> None:
    queue = CallQueue(lambda f: False, TIMEOUT, 1)
    queue.add(0, [Call(0, 0, 0), Call(0, 1, 0)])
    queue.take(0.0)
    with pytest.raises(ValueError, match="not running"):
        queue.done(Call(0, 1, 0), at=0.1)
