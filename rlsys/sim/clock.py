"""An asyncio event loop whose time jumps: an hour of waiting passes at once, in the same order as it would really."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

STANDSTILL = 1_000_000  # rounds of the loop at one instant: something goes round in a circle


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of sleeping until the next timer, moves the clock there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._rounds = 0  # at this instant
        self.quiet: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("deadlock: nothing is ready to run and no timer is set")
        self._rounds += 1
        if self._rounds > STANDSTILL:
            self._rounds = 0  # for what is still to be ended
            raise RuntimeError(f"standstill: {STANDSTILL} rounds of the loop, and it is still {self.now:g} s")
        if timeout > 0:
            self.quiet()
            self._rounds = 0
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and only timers move it, so runs are repeatable.

    For programs that wait for timers and for each other, not for sockets or other processes. Work for threads is done
    by the loop itself, `work_s()` seconds after it was given away, or on the spot where that is 0 (always, or never);
    what one executor was given is done in order. `quiet` is called before time moves on, when everything that could be
    done at once has been.
    """

    def __init__(self, work_s: Callable[[], float] = lambda: 0.0, quiet: Callable[[], None] = lambda: None) -> None:
        self._jumping = _JumpingSelector()
        self._jumping.quiet = quiet
        super().__init__(self._jumping)
        # Timers count as due this much early. The default of 1 ns is lost to rounding after a year of virtual time, and
        # then a timer would never be due.
        self._clock_resolution = 1e-6
        self._work_s = work_s
        self._busy: dict[Executor, float] = {}  # until when
        self.halted = False  # no work is done any more, and none ends

    def time(self) -> float:
        return self._jumping.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, function: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if self.halted:
                return
            try:
                result = function(*args)
            except Exception as error:
                if not future.done():  # nobody may wait for it any more
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        seconds = self._work_s()
        if not seconds:
            work()
            return future
        end = self.time() + seconds
        if executor is not None:
            end = self._busy[executor] = max(self.time(), self._busy.get(executor, 0.0)) + seconds
        self.call_at(end, work)
        return future


def run_virtually(main: Coroutine[Any, Any, T], loop_factory: Callable[[], VirtualLoop] = VirtualLoop) -> T:
    """Run to the end in virtual time. Raises RuntimeError when everything waits for ever, or time stands still."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)
