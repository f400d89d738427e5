"""The learner group as Ray actors, one per rank."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rlsys.actors.answers import answer_or_death
from rlsys.actors.placement import ANYWHERE
from rlsys.actors.processes import SIGNS, Process, Shell, close, starting
from rlsys.algorithms.compose import Algorithm
from rlsys.config.models import Config
from rlsys.durable import Files
from rlsys.errors import LearnerError, WorkerDied
from rlsys.learner.distributed import open_rendezvous
from rlsys.learner.role import LearnerRank
from rlsys.models.staging import staged
from rlsys.roles import Handle, ProcessReport, PublishedWeights, StepReport, TrainItem
from rlsys.secrets import blanks, of_models
from rlsys.storage import Place, deliver, fetch, let_go
from rlsys.types import Prompt
from rlsys.weights import nccl
from rlsys.weights.nccl import Connect, Sender

if TYPE_CHECKING:
    from ray.actor import ActorHandle

BLAME_TIMEOUT_S = 5.0


# Concurrency groups of the calls that run beside training
SENDING = "sending"  # weights
SAVING = "saving"  # a checkpoint


class LearnerActor(Shell):
    """The shell around a `LearnerRank`. Calls of all ranks belong together, and come one at a time.

    Those of the `Sender`, rank 0's with `weights.engine: nccl`, come in the concurrency group `SENDING`, rank 0's
    `write` in `SAVING`.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    def open_rendezvous(self, timeout_s: float) -> tuple[str, int]:
        """Rank 0 only: where the ranks are to meet."""
        address = ray.util.get_node_ip_address()
        self._store = open_rendezvous(address, timeout_s)
        return address, self._store.port

    def start(self, config: Config, model_path: str, rank: int, address: str, port: int) -> None:
        # Not in the constructor: Ray reports what that raises as a dead actor, in text only.
        self._rank = rank
        if rank == 0 and config.weights.engine == "nccl":
            self._sender = Sender(address, self._connect)
        self._learner = LearnerRank(
            config,
            staged(model_path),
            Algorithm.from_config(config.algorithm),
            rank,
            config.learner.ranks,
            address,
            port,
            store=self._store if rank == 0 else None,
            sender=getattr(self, "_sender", None),
        )

    def step(self, scored: Sequence[Handle], reference: Sequence[Handle] | None) -> StepReport | None:
        """The handles are opened here, so that the arrays go from the object store to the ranks and nowhere else."""
        groups = ray.get(list(scored))
        report = self._learner.step(groups, None if reference is None else ray.get(list(reference)))
        return report if self._rank == 0 else None

    def prompt_values(self, prompts: Sequence[Prompt]) -> list[float]:
        return self._learner.prompt_values(prompts)

    def publish(self) -> tuple[PublishedWeights | None, np.ndarray | None]:
        """The driver reads the first of the two; the payload stays in the object store."""
        weights = self._learner.publish()
        return (None, None) if weights is None else (replace(weights, payload=None), weights.payload)

    def meet(self, generator: str, workers: int) -> Mapping[str, Any]:
        return self._sender.meet(generator, workers)

    def join(self, generator: str) -> None:
        self._sender.join(generator)

    def send(self, generator: str, version: int) -> None:
        self._sender.send(generator, version)

    def snapshot(self) -> None:
        self._snapshot = self._learner.snapshot()

    def write(self, place: Place) -> Files:
        """Write the snapshot, and let go of it."""
        snapshot, self._snapshot = self._snapshot, None
        assert snapshot is not None
        return deliver(place, lambda folder: self._learner.write(snapshot, folder))

    def fetch(self, place: Place) -> None:
        self._fetched = fetch(place)

    def load(self) -> int:
        return self._learner.load(self._fetched)

    def let_go(self, place: Place) -> None:
        let_go(place)

    def close(self) -> None:
        self._learner.close()


class RaySender:
    """`weights.nccl.WeightSender` over rank 0's actor."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self._actor = actor

    async def meet(self, generator: str, workers: int) -> Mapping[str, Any]:
        meeting: Mapping[str, Any] = await self._call(self._actor.meet, generator, workers)
        return meeting

    async def join(self, generator: str) -> None:
        await self._call(self._actor.join, generator)

    async def send(self, generator: str, version: int) -> None:
        await self._call(self._actor.send, generator, version)

    async def _call(self, method: Any, *arguments: Any) -> Any:
        return await answer_or_death("learner-0", method.options(concurrency_group=SENDING).remote(*arguments))


class RayLearner:
    """All ranks as the driver sees them (`roles.Learner`). Calls follow each other; none may overlap."""

    name = "learner"

    def __init__(
        self,
        actors: Sequence[ActorHandle[Any]],
        processes: Sequence[Process],
        timeout_s: float,
        sender: RaySender | None = None,
    ) -> None:
        """`timeout_s`: how long a save waits for the one before."""
        self.actors = tuple(actors)
        self._processes = tuple(processes)
        self._timeout_s = timeout_s
        self._sender = sender
        self._completed = 0
        self._saving: asyncio.Future[Files] | None = None

    async def step(self, items: Sequence[TrainItem]) -> StepReport:
        """Raises WorkerDied naming the rank, NonFiniteError, LearnerError."""
        scored = [item.scored for item in items]
        reference = [item.reference for item in items if item.reference is not None]
        if reference and len(reference) != len(items):
            raise LearnerError(f"{len(reference)} of {len(items)} groups came with reference log-probs")
        # in a list, so that Ray passes the handles on unopened
        reports = await self._all([a.step.remote(scored, reference or None) for a in self.actors])
        report: StepReport = reports[0]
        return report

    async def prompt_values(self, prompts: Sequence[Prompt]) -> list[float]:
        prompts = [replace(prompt, demonstration=None, metadata={}) for prompt in prompts]
        values: list[float] = (await self._all([actor.prompt_values.remote(prompts) for actor in self.actors]))[0]
        return values

    async def publish(self) -> PublishedWeights:
        refs: list[Any] = [actor.publish.options(num_returns=2).remote() for actor in self.actors]
        weights: PublishedWeights = (await self._all([ref[0] for ref in refs]))[0]
        return replace(weights, payload=refs[0][1] if self._sender is None else self._sender)

    async def save(self, place: Place) -> Awaitable[Files]:
        """See `roles.Learner.save`, `checkpoint.snapshot` (what is copied) and `checkpoint.write`."""
        if self._saving is not None:
            done, _ = await asyncio.wait([self._saving], timeout=self._timeout_s)
            if not done:
                raise LearnerError(
                    f"the checkpoint before is still being written after {self._timeout_s:g} s "
                    f"(learner.step_timeout_s): {place} is not begun"
                )
        await self._all([actor.snapshot.remote() for actor in self.actors])
        method: Any = self.actors[0].write
        written = method.options(concurrency_group=SAVING).remote(place)
        self._saving = asyncio.ensure_future(answer_or_death("learner-0", written))
        return asyncio.shield(self._saving)  # whoever gives up waiting does not end the writing

    async def load(self, place: Place) -> int:
        """See `roles.Learner.load`."""
        # First, for a rank that cannot have it must not leave the others waiting in the middle of loading.
        await self._all([actor.fetch.remote(place) for actor in self.actors])
        versions = await self._all([actor.load.remote() for actor in self.actors])
        await self._all([actor.let_go.remote(place) for actor in self.actors])
        return int(versions[0])

    async def progress(self) -> int:
        """Raises WorkerDied naming the rank. Comes back when all ranks have given a sign."""
        await self._answers([actor.alive.options(concurrency_group=SIGNS).remote() for actor in self.actors])
        return self._completed

    async def inspect(self) -> list[ProcessReport]:
        """One report a rank."""
        return list(await asyncio.gather(*(process.report() for process in self._processes)))

    async def close(self) -> None:
        """End all ranks, within 15 s. A rank that does not answer, or is dead already, is killed."""
        await close(self._processes, [actor.close.remote() for actor in self.actors])

    async def _all(self, refs: Sequence[Any]) -> list[Any]:
        """The results of a call of all ranks; see `_answers`."""
        results = await self._answers(refs)
        self._completed += 1
        return results

    async def _answers(self, refs: Sequence[Any]) -> list[Any]:
        """Every rank's result, or the failure of the rank that failed first: the others hang or fail because of it."""
        tasks = [asyncio.ensure_future(answer_or_death(f"learner-{rank}", ref)) for rank, ref in enumerate(refs)]
        try:
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            errors = [error for task in done if (error := task.exception()) is not None]
            if errors and not any(isinstance(error, WorkerDied) for error in errors) and rest:
                # a lost connection is reported sooner than the death behind it
                done, _ = await asyncio.wait(rest, timeout=BLAME_TIMEOUT_S)
                errors += [error for task in done if (error := task.exception()) is not None]
            if errors:
                raise next((error for error in errors if isinstance(error, WorkerDied)), errors[0])
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


async def start_learner(
    config: Config, model_path: str | Path, connect: Connect = nccl.connect, places: Sequence[Mapping[str, Any]] = ()
) -> RayLearner:
    """Start all ranks and wait until they have met and loaded the model.

    `connect` is how weights are sent with `weights.engine: nccl`; `places` are Ray's options for where each rank runs.

    Raises DataError or ConfigError for what cannot work, WorkerDied when a rank ends, LearnerError when they are not
    ready within `learner.start_timeout_s`; each with what the ranks printed last.
    """
    timeout_s = config.learner.start_timeout_s
    options: Any = ray.remote  # whose types do not know concurrency groups
    beside = {SIGNS: 1, SAVING: 1}
    if config.weights.engine == "nccl":
        # A generator that dies while it receives may leave a thread behind; its successor needs another one.
        beside[SENDING] = 4 * config.rollout.generators
    remote = options(
        max_restarts=0,
        max_task_retries=0,
        # Threads that spin while they wait take the cores from the generator, and from each other: 4 times slower
        runtime_env={
            "env_vars": {"OMP_WAIT_POLICY": "PASSIVE", **blanks(os.environ, of_models(config.run.storage, model_path))}
        },
        concurrency_groups=beside,
    )(LearnerActor)
    actors: list[ActorHandle[Any]] = [
        remote.options(**place).remote(connect) for place in places or [ANYWHERE] * config.learner.ranks
    ]
    processes = [Process(f"learner-{rank}", actor) for rank, actor in enumerate(actors)]
    sender = RaySender(actors[0]) if config.weights.engine == "nccl" else None
    learner = RayLearner(actors, processes, config.learner.step_timeout_s, sender)
    async with starting(*processes):
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(process.locate() for process in processes))
                address, port = await answer_or_death("learner-0", actors[0].open_rendezvous.remote(timeout_s))
                await learner._answers(
                    [actor.start.remote(config, str(model_path), i, address, port) for i, actor in enumerate(actors)]
                )
        except TimeoutError:
            raise LearnerError(f"the learner was not ready after {timeout_s:g} s (learner.start_timeout_s)") from None
    return learner
