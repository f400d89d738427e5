"""Pools of workers: lease work out, notice death and stall, send the work elsewhere, restart the worker.

    submit(work) -> queue -> router picks a worker -> lease -> answer -> future
                      ^                                 |
                      +---- another attempt <-----------+ died, stalled, or failed at this piece of work

The decisions are the router's, the leases' and the restarts'; this module does what they say.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rlsys.driver.leases import Leases
from rlsys.driver.restarts import Restarts, W, bring_up, end, inspected
from rlsys.driver.router import Router
from rlsys.driver.waiting import give_up, within
from rlsys.errors import EngineError, PlacementError, RlsysError, WorkerDied, WorkerStalled
from rlsys.roles import ProcessReport

J = TypeVar("J")
R = TypeVar("R")

LOOK_S = 5.0  # at most, from one look at a worker to the next
Run = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class WorkFailed(RlsysError):
    """A piece of work was tried on several workers and failed each time."""


@dataclass(slots=True, eq=False)
class _Job(Generic[J, R]):
    id: str
    work: J
    future: asyncio.Future[tuple[R, str]]
    attempts: int = 0
    task: asyncio.Task[None] | None = None
    company: list[_Job[J, R]] = field(default_factory=list)  # what was handed over in one call with it


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker died or was given up. `work` names what it had, oldest first; `processes` come with the report only."""

    worker: str
    error: WorkerDied
    work: tuple[str, ...]
    processes: tuple[ProcessReport, ...] = ()


@dataclass(slots=True)
class WorkerEvents:
    """What the driver wants to hear of. `assigned(work, worker, attempt)`, `failed(work, worker, error)`."""

    changed: Callable[[], None] = lambda: None
    assigned: Callable[[Any, str, int], None] = lambda work, worker, attempt: None
    failed: Callable[[Any, str, RlsysError], None] = lambda work, worker, error: None
    lost: Callable[[Loss], None] = lambda loss: None
    reported: Callable[[Loss], None] = lambda loss: None
    start_failed: Callable[[str, RlsysError], None] = lambda worker, error: None
    unplaced: Callable[[str, PlacementError], None] = lambda worker, error: None  # the run goes on without it
    joined: Callable[[str, bool], None] = lambda worker, again: None
    left: Callable[[str], None] = lambda worker: None


@dataclass(slots=True)
class PoolOptions:
    kind: str  # "generator" or "rewarder", for names and messages
    patience: float  # seconds without progress before a worker is stalled
    silence: float  # seconds without an answer before a worker is stalled
    start_timeout_s: float
    attempts: int  # tries of one piece of work
    capacity: int | None = None  # pieces of work at one worker
    whole: bool = False  # what was handed over in one call is handed over again in one call, to an idle worker
    events: WorkerEvents = field(default_factory=WorkerEvents)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, for people. `state` is starting, healthy, draining or leaving; `work` its pieces of work."""

    name: str
    state: str
    work: int
    failures: int
    version: int | None = None


class WorkerPool(ABC, Generic[W, J, R]):
    """Workers of one kind, named `KIND-0`, `KIND-1`, ...: as many as were asked for, started and restarted here."""

    def __init__(
        self, options: PoolOptions, spawn: Callable[[str], Awaitable[W]], run: Run, restarts: Restarts
    ) -> None:
        self.options = options
        self.restarts = restarts
        self._spawn = spawn
        self._run = run
        self._router = Router(options.capacity)
        self._leases = Leases(options.patience)
        self._wanted: set[str] = set()
        self._starting: set[str] = set()
        self._healthy: dict[str, W] = {}
        self._jobs: dict[str, dict[str, _Job[J, R]]] = {}  # worker -> job id -> job
        self._queue: deque[_Job[J, R]] = deque()
        self._companies: deque[list[_Job[J, R]]] = deque()  # to be handed over again as they were
        self._ids = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # ---- for the driver ----

    def resize(self, count: int) -> None:
        """Have so many workers: start more, or let those with the highest numbers finish their work and go."""
        if count < 1:
            raise ValueError(f"there must be a {self.options.kind} left, got {count}")
        wanted = {f"{self.options.kind}-{i}" for i in range(count)}
        for name in sorted(self._wanted - wanted):
            if name in self._healthy:
                self._router.retire(name)
        for name in sorted(wanted & self._healthy.keys()):
            self._router.retire(name, False)
        self._wanted = wanted
        for name in sorted(wanted - self._healthy.keys() - self._starting):
            self._begin(name)
        self._dispatch()
        self.options.events.changed()

    @property
    def healthy(self) -> dict[str, W]:
        return dict(self._healthy)

    @property
    def complete(self) -> bool:
        """Whether every worker that was asked for is there."""
        return self._wanted <= self._healthy.keys()

    @property
    def settled(self) -> bool:
        """Whether they and nobody else are there."""
        return self._wanted == self._healthy.keys()

    @property
    def size(self) -> int:
        """How many workers were asked for, but for those that there was no room for."""
        return len(self._wanted)

    @property
    def queued(self) -> int:
        """Pieces of work that wait for a worker."""
        return len(self._queue) + sum(map(len, self._companies))

    @property
    def outstanding(self) -> int:
        """Pieces of work queued or lent out."""
        return self.queued + sum(map(len, self._jobs.values()))

    def status(self) -> list[WorkerStatus]:
        names = sorted(self._wanted | self._healthy.keys() | self._starting, key=lambda name: (len(name), name))
        return [self._status(name) for name in names]

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
        self._closed = True
        self._queue.clear()
        self._companies.clear()
        if self._timer is not None:
            self._timer.cancel()

    def lose(self, worker: W, error: WorkerDied) -> None:
        """The worker is dead or given up: its work goes elsewhere, and it is restarted."""
        name = worker.name
        if self._healthy.get(name) is not worker:
            return  # known already
        del self._healthy[name]
        self._router.died(name)
        self._leases.revoke(name)
        self.restarts.failed(name)
        jobs = list(self._jobs.pop(name).values())
        loss = Loss(name, error, tuple(self._called(job.work) for job in jobs))
        self.options.events.lost(loss)
        for job in jobs:
            if job.task is not None and job.task is not asyncio.current_task():
                job.task.cancel()
        for company in _companies(jobs) if self.options.whole else ():
            self._again_together(company, name, error)
        for job in () if self.options.whole else jobs:
            self._try_again(job, name, error)
        self._starting.add(name)
        self._run(self._replace(worker, loss))
        self._dispatch()
        self.options.events.changed()

    # ---- for the kinds of pool ----

    @abstractmethod
    async def _start(self, worker: W, work: Sequence[J]) -> Sequence[Awaitable[R]]:
        """Hand work over; one awaitable per piece."""

    @abstractmethod
    async def _progress(self, worker: W) -> int:
        """The number that has to move while the worker has work. An answer is a sign of life."""

    @abstractmethod
    def _called(self, work: J) -> str:
        """The name of a piece of work, for people."""

    async def _prepare(self, worker: W) -> None:
        """Bring a started worker up to date before it gets work."""

    def _status(self, name: str) -> WorkerStatus:
        here, wanted = name in self._healthy, name in self._wanted
        state = ("healthy" if here else "starting") if wanted else ("draining" if here else "leaving")
        return WorkerStatus(name, state, len(self._jobs.get(name, ())), self.restarts.total[name])

    # ---- work ----

    def _dispatch(self) -> None:
        self._release_retired()
        now = asyncio.get_running_loop().time()
        while self._companies and (name := self._router.choose_idle(now, len(self._companies[0]))) is not None:
            self._hand_out(name, self._companies.popleft(), now)
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
            self._hand_out(name, jobs, now)
        wake = self._router.next_change(now) if self._queue or self._companies else None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake is not None and not self._closed:
            self._timer = asyncio.get_running_loop().call_at(wake, self._dispatch)

    def _hand_out(self, name: str, jobs: list[_Job[J, R]], now: float) -> None:
        for job in jobs:
            job.attempts += 1
            job.company = jobs
            self._leases.grant(name, job.id, now)
            self._jobs[name][job.id] = job
            if not job.future.done():
                self.options.events.assigned(job.work, name, job.attempts)
        self._run(self._hand_over(self._healthy[name], jobs))

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
                    give_up(answer)
                else:
                    job.task = self._run(self._await_answer(worker, job, answer))

    async def _await_answer(self, worker: W, job: _Job[J, R], answer: asyncio.Future[R]) -> None:
        try:
            result = await answer
        except WorkerDied as error:
            self.lose(worker, error)
            return
        except EngineError as error:
            if self._is_to_blame(worker, error):
                self._failed_at(worker, job, error)
            elif self._take_back(worker, job):
                self._give_back(worker, job, error)
        except RlsysError as error:
            if self._take_back(worker, job):
                self._give_back(worker, job, error)
        else:
            if self._take_back(worker, job):
                self._router.done(worker.name)
                self.restarts.worked(worker.name)
                self._completed(worker.name)
                if not job.future.done():
                    job.future.set_result((result, worker.name))
        self._dispatch()

    def _is_to_blame(self, worker: W, error: EngineError) -> bool:
        """Whether the failure is the worker's, so that another one may do better; else it is that of its work."""
        return True

    def _give_back(self, worker: W, job: _Job[J, R], error: RlsysError) -> None:
        """Whoever wants the work is told that it cannot be done."""
        self._router.cancelled(worker.name)
        if not job.future.done():
            job.future.set_exception(error)

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
            job.company.remove(job)  # it goes on alone
            self._try_again(job, worker.name, error)
            if self._router.failures(worker.name) >= max(1, self.restarts.limit) * self.options.attempts:
                self.lose(worker, WorkerDied(worker.name, f"failed again and again: {error}"))

    def _try_again(self, job: _Job[J, R], worker: str, error: RlsysError) -> None:
        if self._has_another_try(job, worker, error):
            self._queue.appendleft(job)

    def _again_together(self, company: list[_Job[J, R]], worker: str, error: RlsysError) -> None:
        """What had been answered comes along: what an engine computes depends on which requests it runs together."""
        tried = [job for job in company if job.future.done() or self._has_another_try(job, worker, error)]
        if any(not job.future.done() for job in tried):
            self._companies.append(tried)

    def _has_another_try(self, job: _Job[J, R], worker: str, error: RlsysError) -> bool:
        if job.future.done():
            return False
        job.task = None
        self.options.events.failed(job.work, worker, error)
        if job.attempts < self.options.attempts:
            return True
        job.future.set_exception(WorkFailed(f"{job.attempts} attempts, the last: {error}"))
        return False

    # ---- workers ----

    def _begin(self, name: str, cause: RlsysError | None = None) -> None:
        self._starting.add(name)
        self._run(self._bring_up(name, cause))

    async def _replace(self, dead: W, loss: Loss) -> None:
        processes = await inspected(dead)
        self.options.events.reported(Loss(loss.worker, loss.error, loss.work, tuple(processes)))
        await end(dead)
        await self._bring_up(dead.name, loss.error)

    async def _bring_up(self, name: str, cause: RlsysError | None) -> None:
        worker = await bring_up(
            name,
            lambda: self._spawn(name),
            self._prepare,
            self.restarts,
            self.options.start_timeout_s,
            cause=cause,
            wanted=lambda: name in self._wanted and not self._closed,
            hopeless=self._hopeless,
            failed=lambda error: self._start_failed(name, error),
        )
        self._starting.discard(name)
        if worker is None:
            self.options.events.left(name)
        else:
            self._join(worker)
            self.options.events.joined(name, cause is not None)
            self._dispatch()
        self.options.events.changed()

    def _start_failed(self, name: str, error: RlsysError) -> None:
        if isinstance(error, PlacementError) and len(self._wanted) > 1:
            self._wanted.discard(name)  # to try again would only take time
            self.options.events.unplaced(name, error)
        else:
            self.options.events.start_failed(name, error)
        self.options.events.changed()

    def _hopeless(self) -> str:
        """Nobody is there, and everybody has been tried too often."""
        if self._healthy or not all(self.restarts.exhausted(name) for name in self._wanted):
            return ""
        return f", and no other {self.options.kind} is healthy"

    def _join(self, worker: W) -> None:
        self._healthy[worker.name] = worker
        self._jobs[worker.name] = {}
        self._router.joined(worker.name)
        self._run(self._watch(worker))

    def _release_retired(self) -> None:
        """End the workers that are not wanted any more and have no work left."""
        for name, worker in list(self._healthy.items()):
            if name not in self._wanted and not self._jobs[name]:
                del self._healthy[name], self._jobs[name]
                self._router.died(name)
                self._leases.revoke(name)
                self._starting.add(name)  # so that its name is not given to another before it is gone
                self._run(self._dismiss(worker))

    async def _dismiss(self, worker: W) -> None:
        await end(worker)
        self._starting.discard(worker.name)
        self.options.events.left(worker.name)
        if worker.name in self._wanted:  # again, meanwhile
            self._begin(worker.name)
        self.options.events.changed()

    async def _watch(self, worker: W) -> None:
        """Look at the worker's progress until it is lost."""
        patience, silence = self.options.patience, self.options.silence
        loop = asyncio.get_running_loop()
        while self._healthy.get(worker.name) is worker:
            await asyncio.sleep(min(patience / 4, silence / 4, LOOK_S))
            silent = WorkerStalled(worker.name, f"gave no sign of life for {silence:g} s")
            try:
                number = await within(silence, self._progress(worker), silent)
            except WorkerDied as error:
                self.lose(worker, error)
                return
            if self._leases.progress(worker.name, number, loop.time()):
                self.options.events.changed()
            if worker.name in self._leases.expired(loop.time()):
                self.lose(worker, WorkerStalled(worker.name, f"has work, but no progress for {patience:g} s"))


def _companies(jobs: Sequence[_Job[J, R]]) -> list[list[_Job[J, R]]]:
    return list({id(job.company): job.company for job in jobs}.values())
