"""The pool of generators."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from rlsys.driver.restarts import Restarts
from rlsys.driver.waiting import within
from rlsys.driver.workers import PoolOptions, Run, WorkerPool, WorkerStatus
from rlsys.errors import HandleLost, WeightUpdateError, WorkerStalled
from rlsys.roles import Generated, Generator, PublishedWeights, Sampling, UpdateReport
from rlsys.types import Prompt


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
        spawn: Callable[[str], Awaitable[Generator]],
        run: Run,
        restarts: Restarts,
        update_timeout_s: float,
        updated: Callable[[UpdateReport, float, float], None],
        publish_again: Callable[[], Awaitable[PublishedWeights]],
    ) -> None:
        self.newest: PublishedWeights | None = None
        # By the worker itself, not by its name: what one takes that was given up meanwhile says nothing of the next.
        self._versions: WeakKeyDictionary[Generator, int] = WeakKeyDictionary()
        self._update_timeout_s = update_timeout_s
        self._updated = updated
        self._publish_again = publish_again
        self._publishing = asyncio.Lock()
        super().__init__(options, spawn, run, restarts)

    @property
    def versions(self) -> dict[str, int]:
        """What each healthy generator has pulled; -1: nothing yet."""
        return {name: self._versions.get(worker, -1) for name, worker in sorted(self._healthy.items())}

    def rolled_out(self) -> int | None:
        """The smallest version among the healthy generators; None when none is healthy."""
        return min(self.versions.values(), default=None)

    async def update(self, generator: Generator, weights: PublishedWeights) -> None:
        """Have one generator take the weights. Raises WorkerDied (WorkerStalled past the deadline) or EngineError.

        When the weights are lost, they are published again, and the generator is still to take them.
        """
        loop = asyncio.get_running_loop()
        late = WorkerStalled(
            generator.name, f"did not take version {weights.version} within {self._update_timeout_s:g} s"
        )
        started = loop.time()
        self._leases.hold(generator.name)
        try:
            report = await within(self._update_timeout_s, generator.update(weights), late)
        except HandleLost:
            await self._replace_weights(weights)
            return
        finally:
            self._leases.resume(generator.name, loop.time())
        if report.version != weights.version:
            raise WeightUpdateError(f"{generator.name} took version {report.version} instead of {weights.version}")
        self._versions[generator] = weights.version
        self._updated(report, started, loop.time())

    async def _replace_weights(self, lost: PublishedWeights) -> None:
        async with self._publishing:
            if self.newest is lost:
                self.newest = await self._publish_again()

    async def _start(self, worker: Generator, work: Sequence[Request]) -> Sequence[Awaitable[Generated]]:
        answers: list[Awaitable[Generated]] = []
        for sampling, requests in itertools.groupby(work, key=lambda request: request.sampling):
            answers += await worker.generate([request.prompt for request in requests], sampling)
        return answers

    async def _progress(self, worker: Generator) -> int:
        return await worker.progress()

    def _called(self, work: Request) -> str:
        return work.prompt.id

    async def _prepare(self, worker: Generator) -> None:
        # Newer weights may be published during an update; joining with older ones than the others would undo the gate.
        while self.newest is not None and self._versions.get(worker, -1) < self.newest.version:
            await self.update(worker, self.newest)

    def _status(self, name: str) -> WorkerStatus:
        return replace(super()._status(name), version=self.versions.get(name))
