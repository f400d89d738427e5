"""Waiting with a deadline: for calls to roles, and for the driver's own state to change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from rlsys.errors import EngineError, RlsysError

STORE_TIMEOUT_S = 120.0

T = TypeVar("T")


async def within(seconds: float, awaitable: Awaitable[T], error: RlsysError) -> T:
    """The result, or `error` when it is not there in time."""
    try:
        async with asyncio.timeout(seconds) as deadline:
            return await awaitable
    except TimeoutError:
        if not deadline.expired():
            raise
        raise error from None


async def stored(call: Awaitable[T]) -> T:
    """What the rollout store answers. Raises EngineError when it does not."""
    late = EngineError(f"the rollout store did not answer in {STORE_TIMEOUT_S:g} s")
    return await within(STORE_TIMEOUT_S, call, late)


async def gathered(futures: Sequence[asyncio.Future[T]]) -> list[T]:
    """All results; the first failure cancels the others and is raised."""
    try:
        return list(await asyncio.gather(*futures))
    finally:
        for future in futures:
            future.cancel()


def give_up(future: asyncio.Future[Any]) -> None:
    """Cancel it. If it fails all the same, that is nobody's concern any more."""
    future.cancel()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())


class Bell:
    """Rung at every change of the driver's state; whoever waits for a condition looks again.

    Everything outside the driver has a deadline of its own, so in a sound run the bell rings long before `patience`. If
    it does not, waiting ends with an error that says what was waited for and how things stand.
    """

    def __init__(self, patience: float, state: Callable[[], str]) -> None:
        self._patience = patience
        self._state = state
        self._next = asyncio.Event()

    def ring(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when the condition holds. Raises RlsysError when nothing has changed for `patience` seconds."""
        while not condition():
            error = RlsysError(f"nothing has moved for {self._patience:g} s while waiting for {what}: {self._state()}")
            await within(self._patience, self._next.wait(), error)
