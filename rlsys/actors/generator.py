"""Rollout generators as Ray actors."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from rlsys.boundary import check_sampled
from rlsys.config.models import Config
from rlsys.errors import EngineError, RlsysError, WorkerDied
from rlsys.roles import Generated, PublishedWeights, Sampling, UpdateReport
from rlsys.rollouts.engine import VllmGenerator
from rlsys.types import GroupInfo, Prompt, RolloutGroup, group_info

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CLOSE_TIMEOUT_S = 15.0
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


EngineFactory = Callable[[str, Config, Path, int], Engine]


class _Asked(NamedTuple):
    """A prompt that is being sampled."""

    prompt: Prompt
    sampling: Sampling
    group: asyncio.Future[RolloutGroup]


class GeneratorActor:
    """The shell around an engine; calls overlap. What the engine gives is checked before it is handed on.

    A batch of prompts comes in one call (`submit`) and goes out in one call per prompt (`result`), so that each group
    is a return value, owned by the caller: it outlives this process, as an object put from here would not.
    """

    def __init__(self, factory: EngineFactory, name: str, config: Config, model_path: Path, version: int) -> None:
        self._arguments = (name, config, model_path, version)
        self._factory = factory
        self._on_refused = config.rollout.on_refused
        self._running: dict[tuple[int, int], _Asked] = {}

    async def start(self) -> None:
        # Not in the constructor: Ray reports what that raises as a dead actor, in text only.
        self._engine = self._factory(*self._arguments)
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

    def __init__(self, name: str, actor: ActorHandle[Any]) -> None:
        self.name = name
        self.actor = actor
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
            task.add_done_callback(functools.partial(self._cancel_with, batch, i))
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

    async def close(self) -> None:
        """End the actor and its engine process. One that is dead already is closed."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.actor.close.remote()
        except (RayActorError, TimeoutError):
            pass  # the kill below ends it in any case, and its engine process ends with it
        ray.kill(self.actor)

    async def _generated(self, info: ray.ObjectRef, group: ray.ObjectRef) -> Generated:
        return Generated(await self._answer(info), group)

    def _cancel_with(self, batch: int, i: int, task: asyncio.Task[Generated]) -> None:
        if task.cancelled():
            self.actor.cancel.remote(batch, i)

    async def _answer(self, ref: Any) -> Any:
        try:
            return await ref
        except (RayActorError, RayTaskError) as error:
            _raise_ours(self.name, error)


async def start_generator(
    name: str, config: Config, model_path: str | Path, version: int = 0, factory: EngineFactory = VllmGenerator
) -> RayGenerator:
    """Start a generator and wait until it can sample.

    It claims its GPUs but no CPU: cores are planned by the number of workers. `version` is what its weights are
    labelled with until the first update. Raises EngineError past `rollout.start_timeout_s`, WorkerDied, and what the
    engine raises.
    """
    gpus = config.rollout.engine.tensor_parallel if config.profile == "gpu" else 0
    remote: Any = ray.remote(GeneratorActor)
    actor: ActorHandle[Any] = remote.options(
        num_cpus=0,
        num_gpus=gpus,
        max_restarts=0,  # one that died is replaced by the driver, which knows what it was doing
        max_task_retries=0,
        max_concurrency=MAX_CALLS,
    ).remote(factory, name, config, Path(model_path), version)
    try:
        async with asyncio.timeout(config.rollout.start_timeout_s):
            await actor.start.remote()
    except TimeoutError:
        ray.kill(actor)
        limit = config.rollout.start_timeout_s
        raise EngineError(f"{name} was not ready within rollout.start_timeout_s={limit:g} s") from None
    except (RayActorError, RayTaskError) as error:
        ray.kill(actor)
        _raise_ours(name, error)
    except BaseException:
        ray.kill(actor)
        raise
    return RayGenerator(name, actor)


def _raise_ours(name: str, error: RayActorError | RayTaskError) -> NoReturn:
    """Raise what an error of Ray means to the driver."""
    if isinstance(error, RayActorError):
        raise WorkerDied(name, _first_line(error)) from error
    cause = error.cause
    if isinstance(cause, RlsysError):
        raise cause from error
    raise EngineError(f"{name}: {type(cause).__name__}: {_first_line(cause)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
