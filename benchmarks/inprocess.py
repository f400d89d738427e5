"""Runs with the real roles in one process, without Ray: one vLLM engine for many, each with a learner of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from weakref import WeakSet

from rlsys.algorithms.compose import Algorithm
from rlsys.algorithms.rollout import bound_strategy
from rlsys.config.models import Config
from rlsys.driver.loop import Driver
from rlsys.durable import Files
from rlsys.errors import ConfigError, RlsysError
from rlsys.learner.distributed import open_rendezvous
from rlsys.learner.role import LearnerRank
from rlsys.ledger.ledger import Ledger
from rlsys.models.loading import load_tokenizer
from rlsys.prompts.stream import PromptStream, eval_prompts
from rlsys.reference.server import ReferenceServer
from rlsys.rewards.worker import RewardWorker
from rlsys.roles import (
    Branch,
    Generated,
    ProcessReport,
    PublishedWeights,
    Roles,
    Sampling,
    Scored,
    StepReport,
    TrainItem,
    UpdateReport,
)
from rlsys.rollouts.engine import VllmGenerator
from rlsys.segments import Strategy, scored
from rlsys.sim.drive import RecordingTracker
from rlsys.sim.roles import MemoryStore
from rlsys.storage import Place
from rlsys.types import Prompt, RolloutGroup, ScoredGroup, group_info
from rlsys.weights.publish import unpack

T = TypeVar("T")


class Here:
    """A role in this process: it lives as long as the program."""

    async def progress(self) -> int:
        return 0

    async def inspect(self) -> Sequence[ProcessReport]:
        return ()


class Generator(Here):
    """An engine that is older than the run: its versions are those of the run and `offset` more."""

    name = "generator-0"

    def __init__(self, engine: VllmGenerator) -> None:
        self._engine = engine
        self._offset = engine.version + 1

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Awaitable[Generated]]:
        return [
            asyncio.ensure_future(self._generated(group)) for group in await self._engine.generate(prompts, sampling)
        ]

    async def _generated(self, answer: Awaitable[RolloutGroup]) -> Generated:
        group = await answer
        rollouts = tuple(
            replace(r, version_spans=tuple(s._replace(version=s.version - self._offset) for s in r.version_spans))
            for r in group.rollouts
        )
        group = replace(group, rollouts=rollouts)
        return Generated(group_info(group), group)

    async def progress(self) -> int:
        return await self._engine.progress()

    async def update(self, weights: PublishedWeights) -> UpdateReport:
        version = weights.version + self._offset
        manifest = {**weights.manifest, "version": version}
        report = await self._engine.update(replace(weights, version=version, manifest=manifest))
        return replace(report, version=weights.version)

    async def close(self) -> None: ...


class Rewarder(Here):
    name = "rewarder-0"

    def __init__(self, worker: RewardWorker, strategy: Strategy) -> None:
        self._worker = worker
        self._strategy = strategy

    async def branch(self, rounds: Sequence[Sequence[RolloutGroup]]) -> Sequence[Branch]:
        return self._strategy.branch(rounds)

    async def score(self, rounds: Sequence[Sequence[RolloutGroup]], training: bool) -> Scored:
        found = await scored(self._strategy if training else None, rounds, self._worker.score)
        return Scored(group_info(found.group, found.rewards), found)

    async def close(self) -> None: ...


class _Threaded(Here):
    """Calls follow each other in a thread, so that the event loop goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


class Learner(_Threaded):
    name = "learner"

    def __init__(self, rank: LearnerRank) -> None:
        super().__init__()
        self._rank = rank

    async def step(self, items: Sequence[TrainItem]) -> StepReport:
        reference = [item.reference for item in items]
        return await self._call(
            self._rank.step, [item.scored for item in items], None if None in reference else reference
        )

    async def publish(self) -> PublishedWeights:
        weights = await self._call(self._rank.publish)
        assert weights is not None
        return weights

    async def prompt_values(self, prompts: Sequence[Prompt]) -> Sequence[float]:
        return await self._call(self._rank.prompt_values, prompts)

    async def save(self, place: Place) -> Awaitable[Files]:
        nothing: Files = {}
        return asyncio.sleep(0, nothing)  # nobody goes on from here

    async def load(self, place: Place) -> int:
        raise NotImplementedError

    async def close(self) -> None:
        await self._call(self._rank.close)


class Reference(_Threaded):
    name = "reference"

    def __init__(self, server: ReferenceServer) -> None:
        super().__init__()
        self._server = server

    async def logprobs(self, groups: Sequence[ScoredGroup]) -> Any:
        return await self._call(self._server.logprobs, groups)

    async def update(self, weights: PublishedWeights) -> None:
        assert weights.payload is not None
        await self._call(self._server.update, unpack(weights.payload, weights.manifest), weights.version)

    async def save(self, place: Place) -> Files:
        return {}

    async def load(self, place: Place) -> int:
        raise NotImplementedError

    async def close(self) -> None: ...


@asynccontextmanager
async def workers(config: Config, model: Path) -> AsyncIterator[tuple[VllmGenerator, RewardWorker]]:
    """An engine and a reward worker for any number of runs."""
    engine, worker = VllmGenerator("generator-0", config, model), RewardWorker(config.rewards)
    await engine.start()
    await worker.start()
    try:
        yield engine, worker
    finally:
        await worker.close()
        await engine.close()


async def run(
    config: Config, model: Path, engine: VllmGenerator, worker: RewardWorker
) -> tuple[RecordingTracker, str | None]:
    """A whole run, and its error if it broke off, which is a result, too."""
    algorithm = Algorithm.from_config(config.algorithm)
    common = (config.prompts, load_tokenizer(model), config.model.max_length - config.rollout.max_new_tokens)
    stream = PromptStream.from_config(config.prompts.train, *common, config.run.seed)
    assert config.prompts.eval is not None
    held_out = eval_prompts(config.prompts.eval, *common, 0, config.eval.prompts)
    tracker, error = RecordingTracker(), None
    with TemporaryDirectory() as directory:
        parts, learner = roles(config, model, algorithm, engine, worker)
        ledger = Ledger(Path(directory) / "ledger.sqlite")
        try:
            driver = Driver(
                *(config, parts, ledger, stream, tracker, Path(directory), held_out, algorithm.filters),
                curriculum=algorithm.curriculum,
                strategy=algorithm.rollout,
                with_greedy=algorithm.needs.greedy,
                with_expert=algorithm.needs.expert,
            )
            await driver.run()
        except RlsysError as found:
            error = str(found)
        finally:
            await learner.close()
            ledger.close()
    return tracker, error


def roles(
    config: Config, model: Path, algorithm: Algorithm, engine: VllmGenerator, worker: RewardWorker
) -> tuple[Roles, Learner]:
    """Those of one run, and its learner, which is to be closed afterwards."""
    bound_strategy(algorithm, config, model)
    store = open_rendezvous("127.0.0.1", 60.0)
    rank = LearnerRank(config, model, algorithm, 0, 1, "127.0.0.1", store.port, store=store)

    learner, generator, rewarder = Learner(rank), Generator(engine), Rewarder(worker, algorithm.rollout)
    reference = Reference(ReferenceServer(config, model)) if algorithm.needs.reference else None
    return Roles(
        store=MemoryStore(),
        spawn_generator=lambda name: _once(generator),
        spawn_rewarder=lambda name: _once(rewarder),
        spawn_learner=lambda config: _once(learner),
        spawn_reference=None if reference is None else lambda: _once(reference),
    ), learner


_given: WeakSet[Any] = WeakSet()


async def _once(role: T) -> T:
    if role in _given:
        raise ConfigError(f"{role} is not restarted here")
    _given.add(role)
    return role
