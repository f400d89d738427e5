"""Pools of workers: lease work out, notice death and stall, send the work elsewhere, restart the worker.

    submit(work) -> queue -> router picks a worker -> lease -> answer -> future
                      ^                                 |
                      +---- another attempt <-----------+ died, stalled, or failed at this piece of work

The decisions are the router's and the leases'; this module does what they say.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from rlsys.driver.leases import Leases
from rlsys.driver.router import Router
from rlsys.driver.waiting import within
from rlsys.errors import EngineError, RlsysError, UserError, WeightUpdateError, WorkerDied, WorkerStalled
from rlsys.roles import Generated, Generator, Handle, PublishedWeights, Rewarder, Sampling, UpdateReport
from rlsys.types import Prompt

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
RESTARTS = 3  # of one worker in a row without a result, when no other is healthy, before the run is given up
LONGEST_PAUSE_S = 60.0  # between two restarts


class Worker(Protocol):
    name: str

    async def close(self) -> None: ...


W = TypeVar("W", bound=Worker)
J = TypeVar("J")
R = TypeVar("R")


class WorkFailed(RlsysError):
    """A piece of work was tried on several workers and failed each time."""


@dataclass(slots=True, eq=False)
class _Job(Generic[J, R]):
    id: str
    work: J
    future: asyncio.Future[tuple[R, str]]
    attempts: int = 0
    task: asyncio.Task[None] | None = None


@dataclass(slots=True)
class PoolEvents:
    """What the driver wants to hear of. `assigned(work, worker, attempt)`, `failed(work, worker, cause)`."""

    changed: Callable[[], None] = lambda: None
    assigned: Callable[[Any, str, int], None] = lambda work, worker, attempt: None
    failed: Callable[[Any, str, str], None] = lambda work, worker, cause: None
    lost: Callable[[str, str], None] = lambda worker, cause: None
    restarted: Callable[[str], None] = lambda worker: None


@dataclass(slots=True)
class PoolOptions:
    kind: str  # "generator" or "rewarder", for messages
    patience: float  # seconds without progress before a worker is stalled
    start_timeout_s: float
    attempts: int  # tries of one piece of work
    capacity: int | None = None  # pieces of work at one worker
    events: PoolEvents = field(default_factory=PoolEvents)


class WorkerPool(ABC, Generic[W, J, R]):
    """Workers of one kind. `workers` is kept up to date, so that whoever made them can close them."""

    def __init__(
        self,
        options: PoolOptions,
        workers: list[W],
        spawn: Callable[[str], Awaitable[W]],
        run: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self.options = options
        self._list = workers
        self._spawn = spawn
        self._run = run
        self._router = Router(options.capacity)
        self._leases = Leases(options.patience)
        self._healthy: dict[str, W] = {}
        self._jobs: dict[str, dict[str, _Job[J, R]]] = {}  # worker -> job id -> job
        self._queue: deque[_Job[J, R]] = deque()
        self._strikes: dict[str, int] = {}  # deaths and failed starts in a row
        self._ids = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    # ---- for the driver ----

    def open(self) -> None:
        """Take the workers in and watch over them."""
        for worker in list(self._list):
            self._join(worker)

    @property
    def healthy(self) -> dict[str, W]:
        return dict(self._healthy)

    @property
    def outstanding(self) -> int:
        """Pieces of work queued or lent out."""
        return len(self._queue) + sum(map(len, self._jobs.values()))

    def submit(self, work: Sequence[J]) -> list[asyncio.Future[tuple[R, str]]]:
        """Futures of (result, worker), in order. They fail with WorkFailed when all attempts have failed.

        Work submitted together that goes to the same worker is handed over in one call.
        """
        loop = asyncio.get_running_loop()
        jobs = [
            _Job[J, R](f"{self.options.kind}-work-{next(self._ids)}", piece, loop.create_future()) for piece in work
        ]
        self._queue.extend(jobs)
        self._dispatch()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Hand nothing out any more."""
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()

    def lose(self, worker: W, error: WorkerDied) -> None:
        """The worker is dead or given up: its work goes elsewhere, and it is restarted."""
        if self._healthy.get(worker.name) is not worker:
            return  # known already
        del self._healthy[worker.name]
        self._router.died(worker.name)
        self._leases.revoke(worker.name)
        self._strikes[worker.name] = self._strikes.get(worker.name, 0) + 1
        self.options.events.lost(worker.name, error.cause)
        for job in self._jobs.pop(worker.name).values():
            if job.task is not None and job.task is not asyncio.current_task():
                job.task.cancel()
            self._try_again(job, worker.name, error)
        self._run(self._restart(worker, error))
        self._dispatch()
        self.options.events.changed()

    # ---- for the kinds of pool ----

    @abstractmethod
    async def _start(self, worker: W, work: Sequence[J]) -> Sequence[Awaitable[R]]:
        """Hand work over; one awaitable per piece."""

    @abstractmethod
    async def _progress(self, worker: W) -> int:
        """The number that has to move while the worker has work."""

    async def _prepare(self, worker: W) -> None:
        """Bring a restarted worker up to date before it gets work."""

    def _left(self, worker: W) -> None:
        """A worker is gone for good."""

    # ---- work ----

    def _dispatch(self) -> None:
        now = asyncio.get_running_loop().time()
        shares: dict[str, list[_Job[J, R]]] = {}
        while self._queue:
            if self._queue[0].future.done():  # cancelled by whoever wanted it
                self._queue.popleft()
                continue
            name = self._router.choose(now)
            if name is None:
                break
            shares.setdefault(name, []).append(self._queue.popleft())
        for name, jobs in shares.items():
            for job in jobs:
                job.attempts += 1
                self._leases.grant(name, job.id, now)
                self._jobs[name][job.id] = job
                self.options.events.assigned(job.work, name, job.attempts)
            self._run(self._hand_over(self._healthy[name], jobs))
        wake = self._router.next_change(now) if self._queue else None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake is not None:
            self._timer = asyncio.get_running_loop().call_at(wake, self._dispatch)

    async def _hand_over(self, worker: W, jobs: list[_Job[J, R]]) -> None:
        stalled = WorkerStalled(worker.name, f"took no work within {self.options.patience:g} s")
        try:
            answers = await within(self.options.patience, self._start(worker, [job.work for job in jobs]), stalled)
        except WorkerDied as error:
            self.lose(worker, error)
        except EngineError as error:
            for job in jobs:
                self._failed_at(worker, job, error)
            self._dispatch()
        else:
            given_up = self._healthy.get(worker.name) is not worker
            for job, awaitable in zip(jobs, answers, strict=True):
                answer = asyncio.ensure_future(awaitable)
                if given_up:  # meanwhile; the work is elsewhere by now
                    answer.cancel()
                else:
                    job.task = self._run(self._await_answer(worker, job, answer))

    async def _await_answer(self, worker: W, job: _Job[J, R], answer: asyncio.Future[R]) -> None:
        try:
            result = await answer
        except WorkerDied as error:
            self.lose(worker, error)
            return
        except EngineError as error:
            self._failed_at(worker, job, error)
        except RlsysError as error:
            self._take_back(worker, job)
            if not job.future.done():
                job.future.set_exception(error)
        else:
            if self._take_back(worker, job):
                self._router.done(worker.name)
                self._strikes[worker.name] = 0
                self._completed(worker.name)
                if not job.future.done():
                    job.future.set_result((result, worker.name))
        self._dispatch()

    def _completed(self, name: str) -> None:
        """A worker has finished a piece of work."""

    def _take_back(self, worker: W, job: _Job[J, R]) -> bool:
        """End the lease; False when it was revoked before."""
        if self._healthy.get(worker.name) is not worker or self._jobs[worker.name].pop(job.id, None) is None:
            return False
        self._leases.release(job.id)
        return True

    def _failed_at(self, worker: W, job: _Job[J, R], error: EngineError) -> None:
        if self._take_back(worker, job):
            self._router.failed(worker.name, asyncio.get_running_loop().time())
            self._try_again(job, worker.name, error)
            if self._router.failures(worker.name) >= RESTARTS * self.options.attempts:
                self.lose(worker, WorkerDied(worker.name, f"failed again and again: {error}"))

    def _try_again(self, job: _Job[J, R], worker: str, error: RlsysError) -> None:
        if job.future.done():
            return
        job.task = None
        self.options.events.failed(job.work, worker, str(error))
        if job.attempts < self.options.attempts:
            self._queue.appendleft(job)
        else:
            job.future.set_exception(WorkFailed(f"{job.attempts} attempts, the last: {error}"))

    # ---- workers ----

    def _join(self, worker: W) -> None:
        self._healthy[worker.name] = worker
        self._jobs[worker.name] = {}
        self._router.joined(worker.name)
        self._run(self._watch(worker))

    async def _watch(self, worker: W) -> None:
        """Look at the worker's progress until it is lost."""
        patience = self.options.patience
        loop = asyncio.get_running_loop()
        while self._healthy.get(worker.name) is worker:
            await asyncio.sleep(patience / 4)
            silent = WorkerStalled(worker.name, f"did not report its progress within {patience:g} s")
            try:
                number = await within(patience, self._progress(worker), silent)
            except WorkerDied as error:
                self.lose(worker, error)
                return
            if self._leases.progress(worker.name, number, loop.time()):
                self.options.events.changed()
            if worker.name in self._leases.expired(loop.time()):
                self.lose(worker, WorkerStalled(worker.name, f"has work, but no progress for {patience:g} s"))

    async def _restart(self, dead: W, cause: RlsysError) -> None:
        name = dead.name
        await self._end(dead)
        while True:
            strikes = self._strikes[name]
            if strikes > RESTARTS and not self._healthy:
                raise EngineError(
                    f"{name} failed {strikes} times in a row, and no other {self.options.kind} is healthy: {cause}"
                )
            if strikes > 1:
                await asyncio.sleep(min(LONGEST_PAUSE_S, 2.0 ** (strikes - 2)))
            late = WorkerStalled(name, f"was not ready within {self.options.start_timeout_s:g} s")
            worker: W | None = None
            try:
                worker = await within(self.options.start_timeout_s, self._spawn(name), late)
                await self._prepare(worker)
            except UserError:
                raise
            except RlsysError as error:
                cause = error
                self._strikes[name] += 1
                if worker is not None:
                    await self._end(worker)
            else:
                break
        self._list[:] = [worker if old.name == name else old for old in self._list]
        self._join(worker)
        self.options.events.restarted(name)
        self._dispatch()
        self.options.events.changed()

    async def _end(self, worker: W) -> None:
        """Make sure that a given-up worker is gone. It may be gone already, or too far gone to answer."""
        late = WorkerStalled(worker.name, f"did not end within {CLOSE_TIMEOUT_S:g} s")
        try:
            await within(CLOSE_TIMEOUT_S, worker.close(), late)
        except (WorkerDied, EngineError) as error:
            logger.warning("%s could not be ended cleanly: %s", worker.name, error)
        self._left(worker)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be sampled, for training or for an evaluation."""

    prompt: Prompt
    sampling: Sampling
    training: bool
    root: str | None = None  # id of the prompt that this one is a branch of


class GeneratorPool(WorkerPool[Generator, Request, Generated]):
    """Generators, and the weight version that each has pulled."""

    def __init__(
        self,
        options: PoolOptions,
        workers: list[Generator],
        spawn: Callable[[str], Awaitable[Generator]],
        run: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        update_timeout_s: float,
        updated: Callable[[UpdateReport, float, float], None],
    ) -> None:
        self.newest: PublishedWeights | None = None
        # By the worker itself, not by its name: what one takes that was given up meanwhile says nothing of the next.
        self._versions: dict[Generator, int] = {}
        self._update_timeout_s = update_timeout_s
        self._updated = updated
        super().__init__(options, workers, spawn, run)

    @property
    def versions(self) -> dict[str, int]:
        """What each healthy generator has pulled; -1: nothing yet."""
        return {name: self._versions.get(worker, -1) for name, worker in sorted(self._healthy.items())}

    def rolled_out(self) -> int | None:
        """The smallest version among the healthy generators; None when none is healthy."""
        return min(self.versions.values(), default=None)

    async def update(self, generator: Generator, weights: PublishedWeights) -> None:
        """Have one generator take the weights. Raises WorkerDied (WorkerStalled past the deadline) or EngineError."""
        loop = asyncio.get_running_loop()
        late = WorkerStalled(
            generator.name, f"did not take version {weights.version} within {self._update_timeout_s:g} s"
        )
        started = loop.time()
        self._leases.hold(generator.name)
        try:
            report = await within(self._update_timeout_s, generator.update(weights), late)
        finally:
            self._leases.resume(generator.name, loop.time())
        if report.version != weights.version:
            raise WeightUpdateError(f"{generator.name} took version {report.version} instead of {weights.version}")
        self._versions[generator] = weights.version
        self._updated(report, started, loop.time())

    async def _start(self, worker: Generator, work: Sequence[Request]) -> Sequence[Awaitable[Generated]]:
        answers: list[Awaitable[Generated]] = []
        for sampling, requests in itertools.groupby(work, key=lambda request: request.sampling):
            answers += await worker.generate([request.prompt for request in requests], sampling)
        return answers

    async def _progress(self, worker: Generator) -> int:
        return await worker.progress()

    async def _prepare(self, worker: Generator) -> None:
        # Newer weights may be published during an update; joining with older ones than the others would undo the gate.
        while self.newest is not None and self._versions.get(worker, -1) < self.newest.version:
            await self.update(worker, self.newest)

    def _left(self, worker: Generator) -> None:
        self._versions.pop(worker, None)


@dataclass(frozen=True, slots=True)
class Rounds:
    """A prompt's groups, round by round: to be scored, or (`branch`) asked what comes next."""

    groups: Sequence[Sequence[Handle]]
    training: bool
    branch: bool = False


class RewarderPool(WorkerPool[Rewarder, Rounds, Any]):
    """Reward workers. Their progress is the number of pieces of work they have done: `Scored`, or branches."""

    def __init__(
        self,
        options: PoolOptions,
        workers: list[Rewarder],
        spawn: Callable[[str], Awaitable[Rewarder]],
        run: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._scored: dict[str, int] = {}
        super().__init__(options, workers, spawn, run)

    async def _start(self, worker: Rewarder, work: Sequence[Rounds]) -> Sequence[Awaitable[Any]]:
        return [
            worker.branch(piece.groups) if piece.branch else worker.score(piece.groups, piece.training)
            for piece in work
        ]

    async def _progress(self, worker: Rewarder) -> int:
        return self._scored.get(worker.name, 0)

    def _completed(self, name: str) -> None:
        self._scored[name] = self._scored.get(name, 0) + 1
