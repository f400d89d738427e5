"""Rollout generators as Ray actors."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ray
from ray.exceptions import RayTaskError

from rlsys.actors.answers import answer
from rlsys.actors.placement import ANYWHERE
from rlsys.actors.processes import Process, Shell, close, first_line, starting
from rlsys.boundary import check_sampled
from rlsys.config.models import Config
from rlsys.errors import EngineError
from rlsys.models.staging import staged
from rlsys.roles import Generated, ProcessReport, PublishedWeights, Sampling, UpdateReport
from rlsys.rollouts.engine import VllmGenerator
from rlsys.secrets import blanks, of_models
from rlsys.types import GroupInfo, Prompt, RolloutGroup, group_info

if TYPE_CHECKING:
    from ray.actor import ActorHandle

MAX_CALLS = 100_000  # calls in an actor at once: each prompt in flight is one


class Engine(Protocol):
    """What the actor works with: `VllmGenerator`, `FakeGenerator`."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        ...

    async def start(self) -> None: ...
    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Awaitable[RolloutGroup]]: ...
    async def progress(self) -> int: ...
    async def update(self, weights: PublishedWeights) -> UpdateReport: ...
    async def close(self) -> None: ...


EngineFactory = Callable[[str, Config, str, int], Engine]


class _Asked(NamedTuple):
    """A prompt that is being sampled."""

    prompt: Prompt
    sampling: Sampling
    group: asyncio.Future[RolloutGroup]


class GeneratorActor(Shell):
    """The shell around an engine; calls overlap. What the engine gives is checked before it is handed on.

    A batch of prompts comes in one call (`submit`) and goes out in one call per prompt (`result`), so that each group
    is a return value, owned by the caller: it outlives this process, as an object put from here would not.
    """

    def __init__(self, factory: EngineFactory, name: str, config: Config, model_path: str, version: int) -> None:
        self._arguments = (name, config, model_path, version)
        self._factory = factory
        self._on_refused = config.rollout.on_refused
        self._running: dict[tuple[int, int], _Asked] = {}

    async def start(self) -> None:
        # Not in the constructor: Ray reports what that raises as a dead actor, in text only.
        name, config, model_path, version = self._arguments
        self._engine = self._factory(name, config, await asyncio.to_thread(staged, model_path), version)
        await self._engine.start()

    async def submit(self, batch: int, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        groups = await self._engine.generate(prompts, sampling)
        for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
            self._running[batch, i] = _Asked(prompt, sampling, asyncio.ensure_future(group))

    async def result(self, batch: int, i: int) -> tuple[GroupInfo, RolloutGroup]:
        """The driver reads the first of the two; the second stays where it is until somebody needs it.

        Raises BadRollout, or RolloutError, for a group that cannot be right.
        """
        asked = self._running[batch, i]
        try:
            group = await asked.group
        except asyncio.CancelledError:
            raise EngineError("the caller did not want this prompt any more") from None
        finally:
            del self._running[batch, i]
        check_sampled(group, asked.prompt, asked.sampling, self._engine.vocabulary, self._on_refused)
        return group_info(group), group

    async def cancel(self, batch: int, i: int) -> None:
        """Sample a prompt no longer. Not by ray.cancel, which may keep `result` from ever running."""
        if asked := self._running.get((batch, i)):
            asked.group.cancel()

    async def progress(self) -> int:
        return await self._engine.progress()

    async def update(self, weights: PublishedWeights, payload: Any) -> UpdateReport:
        """`payload` is an argument of its own because Ray fetches references only when they are arguments
        themselves."""
        return await self._engine.update(
            PublishedWeights(weights.version, weights.manifest, payload, weights.probe, weights.gather_s)
        )

    async def close(self) -> None:
        await self._engine.close()


class RayGenerator:
    """A generator as the driver sees it (`roles.Generator`)."""

    def __init__(self, name: str, actor: ActorHandle[Any], process: Process) -> None:
        self.name = name
        self.actor = actor
        self._process = process
        self._batches = itertools.count()

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Awaitable[Generated]]:
        """Raises WorkerDied, and what the engine raises. Cancelling an awaitable ends the requests of its prompt."""
        batch = next(self._batches)
        await self._answer(self.actor.submit.remote(batch, list(prompts), sampling))
        answers: list[Awaitable[Generated]] = []
        # Asked for at once, all of them: a group that nobody waits for yet must not stay behind in a process that may
        # die.
        for i in range(len(prompts)):
            info, group = self.actor.result.options(num_returns=2).remote(batch, i)
            task = asyncio.create_task(self._generated(info, group))
            # Not in the task itself: one that is cancelled before its first step never runs.
            task.add_done_callback(functools.partial(self._done, batch, i))
            answers.append(task)
        return answers

    async def progress(self) -> int:
        """Raises WorkerDied."""
        count: int = await self._answer(self.actor.progress.remote())
        return count

    async def update(self, weights: PublishedWeights) -> UpdateReport:
        """Raises WorkerDied, and WeightUpdateError as the engine does."""
        described = PublishedWeights(weights.version, weights.manifest, None, weights.probe, weights.gather_s)
        report: UpdateReport = await self._answer(self.actor.update.remote(described, weights.payload))
        return report

    async def inspect(self) -> list[ProcessReport]:
        return [await self._process.report()]

    async def close(self) -> None:
        """End the actor and its engine process, within 15 s. One that is dead already is closed."""
        await close([self._process], [self.actor.close.remote()])

    async def _generated(self, info: ray.ObjectRef, group: ray.ObjectRef) -> Generated:
        return Generated(await self._answer(info), group)

    def _done(self, batch: int, i: int, task: asyncio.Task[Generated]) -> None:
        if task.cancelled():
            self.actor.cancel.remote(batch, i)
        else:
            task.exception()  # nobody may be waiting for it any more: then asyncio is not to complain

    async def _answer(self, ref: Any) -> Any:
        try:
            return await answer(self.name, ref)
        except RayTaskError as error:
            raise _failed(self.name, error) from error


async def start_generator(
    name: str,
    config: Config,
    model_path: str | Path,
    version: int = 0,
    factory: EngineFactory = VllmGenerator,
    place: Mapping[str, Any] = ANYWHERE,
) -> RayGenerator:
    """Start a generator and wait until it can sample.

    `place` are Ray's options for where it runs, and what it claims there; `version` is what its weights are labelled
    with until the first update. Raises EngineError past `rollout.start_timeout_s`, WorkerDied, and what the
    engine raises; failures come with what the process printed last.
    """
    remote: Any = ray.remote(GeneratorActor)
    actor: ActorHandle[Any] = remote.options(
        **place,
        max_restarts=0,  # one that died is replaced by the driver, which knows what it was doing
        max_task_retries=0,
        max_concurrency=MAX_CALLS,
        runtime_env={"env_vars": blanks(os.environ, of_models(model_path))},
    ).remote(factory, name, config, str(model_path), version)
    process = Process(name, actor)
    async with starting(process):
        try:
            async with asyncio.timeout(config.rollout.start_timeout_s):
                await process.locate()
                await answer(name, actor.start.remote())
        except TimeoutError:
            limit = config.rollout.start_timeout_s
            raise EngineError(f"{name} was not ready within rollout.start_timeout_s={limit:g} s") from None
        except RayTaskError as error:
            raise _failed(name, error) from error
    return RayGenerator(name, actor, process)


def _failed(name: str, error: RayTaskError) -> EngineError:
    """What nobody foresaw: vLLM has many ways to fail, which the router holds against the generator."""
    return EngineError(f"{name}: {type(error.cause).__name__}: {first_line(error.cause)}")
