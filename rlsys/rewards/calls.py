"""Which call of a reward function runs next, and which one is to blame when the child process hangs or dies.

A pure state machine: no processes and no clock of its own. Times are seconds of any monotonic clock.

The child runs plain functions one after the other, in the order in which they were sent, and up to `concurrency` async
ones at once beside them. It cancels an async call at the time-out by itself; a plain call cannot be cancelled, so its
process is killed.

Invariants:

- A call is in one place: waiting, sent, alone (to be run by itself), or done.
- A call is only given up when it was certainly the culprit: nothing else was running. When several could have done
  it, or the process died by itself (killed from outside?), each suspect is run again alone.
- So every loss of a process makes progress: a call is given up, or finished, or moved to those that run alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Plain calls sent ahead of the one that runs, so that the child never waits for the next.
_AHEAD = 256


class Call(NamedTuple):
    """One function on one rollout."""

    job: int  # number of the group within its worker
    sample: int
    function: int


class CallQueue:
    """The calls of one worker. `is_async(function)` tells the two kinds apart."""

    def __init__(self, is_async: Callable[[int], bool], timeout_s: float, concurrency: int) -> None:
        self._is_async = is_async
        self._timeout_s = timeout_s
        self._concurrency = concurrency
        self._jobs: set[int] = set()
        self._plain: deque[Call] = deque()  # waiting
        self._async: deque[Call] = deque()  # waiting
        self._alone: deque[Call] = deque()  # suspects, waiting
        self._sent_plain: deque[Call] = deque()  # the first one is running
        self._sent_async: dict[Call, float] = {}  # since when
        self._plain_since = 0.0  # since when the first of `_sent_plain` has been running
        self._lone: Call | None = None  # a suspect that is running by itself

    def add(self, job: int, calls: Iterable[Call]) -> None:
        self._jobs.add(job)
        for call in calls:
            (self._async if self._is_async(call.function) else self._plain).append(call)

    def drop(self, job: int) -> None:
        """Forget a job. Calls of it that were sent go on, and nobody waits for them."""
        self._jobs.discard(job)
        for waiting in (self._plain, self._async, self._alone):
            kept = [call for call in waiting if call.job != job]
            waiting.clear()
            waiting.extend(kept)

    @property
    def waiting(self) -> bool:
        """Whether anything needs a process."""
        return bool(self._plain or self._async or self._alone)

    @property
    def sent(self) -> int:
        return len(self._sent_plain) + len(self._sent_async)

    def take(self, now: float) -> list[Call]:
        """What to send now."""
        if self._lone is not None:
            return []
        if self._alone:
            if self.sent:
                return []
            self._lone = self._send(self._alone.popleft(), now)
            return [self._lone]
        calls = []
        while self._async and len(self._sent_async) < self._concurrency:
            calls.append(self._send(self._async.popleft(), now))
        if len(self._sent_plain) <= _AHEAD // 2:  # many at once rather than one for one
            while self._plain and len(self._sent_plain) < _AHEAD:
                calls.append(self._send(self._plain.popleft(), now))
        return calls

    def _send(self, call: Call, now: float) -> Call:
        if self._is_async(call.function):
            self._sent_async[call] = now
        else:
            if not self._sent_plain:
                self._plain_since = now
            self._sent_plain.append(call)
        return call

    def done(self, call: Call, at: float) -> None:
        """The child answered, at time `at` by its clock."""
        if call in self._sent_async:
            del self._sent_async[call]
        elif self._sent_plain and self._sent_plain[0] == call:
            self._sent_plain.popleft()
            self._plain_since = at
        else:
            raise ValueError(f"{call} was answered but is not running")
        if call == self._lone:
            self._lone = None

    def deadline(self) -> float | None:
        """When the child will have to be killed, unless something finishes before."""
        times = [since + 2 * self._timeout_s for since in self._sent_async.values()]
        if self._sent_plain:
            times.append(self._plain_since + self._timeout_s)
        return min(times, default=None)

    def lost(self, now: float, killed: bool) -> list[Call]:
        """The child is gone, `killed` by us at `now` for a deadline or by itself. Returns the calls to give up.

        A plain call past its deadline hangs, unless an async one beside it holds the interpreter lock. An async call is
        past its deadline at twice the time-out: by then the child would have cancelled it, so its event loop is
        blocked, by any of the async calls. (Not by a plain one that holds the lock: that one began before the async
        call was due to be cancelled, and so has reached its own deadline.)
        """
        running = list(self._sent_plain)[:1]
        suspects: list[Call] = []
        certain = self._lone is not None
        if not killed or (running and now >= self._plain_since + self._timeout_s):
            suspects = [*running, *self._sent_async]
            certain = certain or (killed and len(suspects) == 1)
        elif any(now >= since + 2 * self._timeout_s for since in self._sent_async.values()):
            suspects = list(self._sent_async)
            certain = certain or len(suspects) == 1

        for sent, waiting in ((self._sent_plain, self._plain), (self._sent_async, self._async)):
            waiting.extendleft(c for c in reversed(list(sent)) if c not in suspects and c.job in self._jobs)
            sent.clear()
        self._lone = None
        if certain:
            return suspects
        self._alone.extend(call for call in suspects if call.job in self._jobs)
        return []
