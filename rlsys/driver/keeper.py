"""A role of which there is one: kept alive, and asked again after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rlsys.driver.restarts import Restarts, W, bring_up, end, inspected
from rlsys.driver.waiting import give_up, within
from rlsys.driver.workers import Loss, Run, WorkerEvents, WorkerStatus, WorkFailed
from rlsys.errors import RlsysError, WorkerDied, WorkerStalled

T = TypeVar("T")


@dataclass(slots=True)
class KeeperOptions:
    name: str
    start_timeout_s: float  # to start it, and to bring it up to date
    timeout_s: float  # of one call
    timeout_key: str  # of the config, for messages
    silence: float  # seconds without a sign of life before it is given up
    events: WorkerEvents = field(default_factory=WorkerEvents)


class Keeper(Generic[W]):
    """Starts the role, watches it, restarts it when it dies, hangs, or is late, and repeats what it was asked.

    Calls may overlap. The worker works on them in order of arrival, so the oldest is what it died of, if of any.
    """

    def __init__(
        self,
        options: KeeperOptions,
        spawn: Callable[[], Awaitable[W]],
        prepare: Callable[[W], Awaitable[None]],
        run: Run,
        restarts: Restarts,
    ) -> None:
        self.options = options
        self.restarts = restarts
        self.spawn = spawn
        self._prepare = prepare
        self._run = run
        self._worker: W | None = None
        self._gone: asyncio.Future[WorkerDied] | None = None  # of the present worker: why it was lost
        self._ready = asyncio.Event()
        self._asked: dict[object, str] = {}  # what is outstanding, oldest first
        self._blamed: dict[object, int] = {}

    @property
    def worker(self) -> W | None:
        """The role, while it is there."""
        return self._worker

    def open(self) -> None:
        """Start it."""
        self._run(self._bring_up(None))

    async def ready(self) -> None:
        """Return when it is there."""
        await self._ready.wait()

    async def call(self, ask: Callable[[W], Awaitable[T]], what: str, attempts: int | None = None) -> T:
        """The answer, whatever becomes of the worker meanwhile. `what` it is asked to do completes a message.

        Raises WorkFailed when this call was what the worker died of `attempts` times (None: the run cannot do without
        it), and what the worker itself raises. The run ends by itself when the worker cannot be restarted.
        """
        key = object()
        self._asked[key] = what
        self._blamed[key] = 0
        try:
            while True:
                await self._ready.wait()
                worker, gone = self._present()
                answer = asyncio.ensure_future(ask(worker))
                try:
                    first: set[asyncio.Future[Any]] = {answer, gone}
                    await asyncio.wait(first, timeout=self.options.timeout_s, return_when=asyncio.FIRST_COMPLETED)
                    if answer.done():
                        return answer.result()
                    if not gone.done():
                        limit = f"{self.options.timeout_key}={self.options.timeout_s:g} s"
                        self.lose(worker, WorkerStalled(worker.name, f"did not {what} within {limit}"))
                except WorkerDied as error:
                    self.lose(worker, error)
                finally:
                    give_up(answer)
                if attempts is not None and self._blamed[key] >= attempts:
                    raise WorkFailed(f"{self._blamed[key]} attempts, the last: {gone.result()}")
        finally:
            del self._asked[key], self._blamed[key]

    def worked(self) -> None:
        """It has done what it is there for: failures before this are over."""
        self.restarts.worked(self.options.name)

    def lose(self, worker: W, error: WorkerDied) -> None:
        """The worker is dead or given up: it is restarted, and what it was asked is asked again."""
        if self._worker is not worker or self._gone is None:
            return  # known already
        self._worker = None
        self._ready.clear()
        self._gone.set_result(error)
        self.restarts.failed(self.options.name)
        if self._asked:
            self._blamed[next(iter(self._asked))] += 1
        loss = Loss(self.options.name, error, tuple(self._asked.values()))
        self.options.events.lost(loss)
        self._run(self._replace(worker, loss))
        self.options.events.changed()

    async def renew(self) -> None:
        """End the worker and start another one; calls wait meanwhile.

        When it cannot be started, that ends the run, and is no failure of whoever asked for it.
        """
        await self._ready.wait()
        worker, gone = self._present()
        self._worker = None
        self._ready.clear()
        gone.set_result(WorkerDied(self.options.name, "it is being renewed"))
        await end(worker)
        self._run(self._bring_up(None))
        await self._ready.wait()

    def status(self) -> WorkerStatus:
        state = "starting" if self._worker is None else "healthy"
        return WorkerStatus(self.options.name, state, len(self._asked), self.restarts.total[self.options.name])

    def _present(self) -> tuple[W, asyncio.Future[WorkerDied]]:
        assert self._worker is not None
        assert self._gone is not None
        return self._worker, self._gone

    async def _replace(self, dead: W, loss: Loss) -> None:
        processes = await inspected(dead)
        self.options.events.reported(Loss(loss.worker, loss.error, loss.work, tuple(processes)))
        await end(dead)
        await self._bring_up(loss.error)

    async def _bring_up(self, cause: RlsysError | None) -> None:
        name = self.options.name
        worker = await bring_up(
            name,
            self.spawn,
            self._prepare,
            self.restarts,
            self.options.start_timeout_s,
            cause=cause,
            hopeless=lambda: ", and there is no other",
            failed=lambda error: self._start_failed(error),
        )
        assert worker is not None
        self._worker = worker
        self._gone = asyncio.get_running_loop().create_future()
        self._ready.set()
        self._run(self._watch(worker))
        self.options.events.joined(name, cause is not None)
        self.options.events.changed()

    def _start_failed(self, error: RlsysError) -> None:
        self.options.events.start_failed(self.options.name, error)
        self.options.events.changed()

    async def _watch(self, worker: W) -> None:
        """Ask for a sign of life, again and again, until the worker is lost."""
        silence = self.options.silence
        while self._worker is worker:
            await asyncio.sleep(silence / 4)
            silent = WorkerStalled(self.options.name, f"gave no sign of life for {silence:g} s")
            try:
                await within(silence, worker.progress(), silent)
            except WorkerDied as error:
                self.lose(worker, error)
