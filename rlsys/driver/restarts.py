"""Bringing a role up, as often as it takes: how often, how long between, and when to give up."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from rlsys.driver.waiting import within
from rlsys.errors import EngineError, RlsysError, UserError, WorkerDied, WorkerStalled
from rlsys.roles import INSPECT_TIMEOUT_S, ProcessReport

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 45.0  # for ending a worker; what it does in that time has its own limits, which are shorter
LONGEST_PAUSE_S = 60.0  # between two restarts


class Worker(Protocol):
    """What is restarted."""

    @property
    def name(self) -> str: ...
    async def progress(self) -> int: ...
    async def inspect(self) -> Sequence[ProcessReport]: ...
    async def close(self) -> None: ...


W = TypeVar("W", bound=Worker)


class Restarts:
    """Counts the failures of roles. Pure: no I/O, no clock.

    A failure is a death, a hang, or a start that did not succeed. The pause before the next start is 0 s after the
    first failure in a row, then 1, 2, 4, ... s, at most `longest`. A role that has failed more than `limit` times in a
    row is exhausted. `worked` ends a row: the role has done what it is there for.
    """

    def __init__(self, limit: int, longest: float = LONGEST_PAUSE_S) -> None:
        self.limit = limit
        self.longest = longest
        self.total: Counter[str] = Counter()  # failures of each role, in all
        self._row: Counter[str] = Counter()

    def failed(self, name: str) -> None:
        self.total[name] += 1
        self._row[name] += 1

    def worked(self, name: str) -> None:
        self._row.pop(name, None)

    def in_a_row(self, name: str) -> int:
        return self._row[name]

    def exhausted(self, name: str) -> bool:
        return self._row[name] > self.limit

    def pause(self, name: str) -> float:
        """Seconds to wait before the next start."""
        failures = self._row[name]
        return 0.0 if failures < 2 else min(self.longest, 2.0 ** min(failures - 2, 32))


async def bring_up(
    name: str,
    spawn: Callable[[], Awaitable[W]],
    prepare: Callable[[W], Awaitable[None]],
    restarts: Restarts,
    start_timeout_s: float,
    *,
    cause: RlsysError | None = None,
    wanted: Callable[[], bool] = lambda: True,
    hopeless: Callable[[], str] = lambda: "",
    failed: Callable[[RlsysError], None] = lambda error: None,
) -> W | None:
    """Start a role and bring it up to date; None when it is not `wanted` any more.

    `cause` is why the one before ended. Once the role is exhausted and `hopeless` says why that ends the run, raises
    EngineError with that, how often it failed, and the last failure. A UserError is raised at once: to repeat what
    cannot work would only take time. `failed` hears of every start that did not succeed.
    """
    while wanted():
        if restarts.exhausted(name) and (why := hopeless()):
            raise EngineError(f"{name} failed {restarts.in_a_row(name)} times in a row{why}: {cause}") from cause
        if cause is not None and (pause := restarts.pause(name)):
            await asyncio.sleep(pause)
        late = WorkerStalled(name, f"was not ready within {start_timeout_s:g} s")
        worker: W | None = None
        try:
            worker = await within(start_timeout_s, spawn(), late)
            await prepare(worker)
        except UserError:
            if worker is not None:
                await end(worker)
            raise
        except RlsysError as error:
            cause = error
            restarts.failed(name)
            if worker is not None:
                await end(worker)
            failed(error)
        else:
            if wanted():
                return worker
            await end(worker)
    return None


async def end(worker: Worker) -> None:
    """Make sure that a worker is gone. It may be gone already, or too far gone to answer."""
    late = WorkerStalled(worker.name, f"did not end within {CLOSE_TIMEOUT_S:g} s")
    try:
        await within(CLOSE_TIMEOUT_S, worker.close(), late)
    except (WorkerDied, EngineError) as error:
        logger.warning("%s could not be ended cleanly: %s", worker.name, error)


async def inspected(worker: Worker) -> Sequence[ProcessReport]:
    """What its processes were doing; nothing when that cannot be found out in time."""
    late = WorkerStalled(worker.name, f"could not be inspected within {2 * INSPECT_TIMEOUT_S:g} s")
    try:
        return await within(2 * INSPECT_TIMEOUT_S, worker.inspect(), late)
    except (WorkerDied, EngineError) as error:
        logger.warning("%s", error)
        return ()
