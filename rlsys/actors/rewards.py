"""Reward workers as Ray actors."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from rlsys.actors.answers import answer
from rlsys.actors.placement import ANYWHERE
from rlsys.actors.processes import Process, Shell, close, starting
from rlsys.boundary import OnRefused, check_received
from rlsys.config.models import RewardsConfig
from rlsys.errors import WorkerDied
from rlsys.rewards.setup import with_absolute_paths
from rlsys.rewards.worker import RewardWorker, default_search_path
from rlsys.roles import Branch, Handle, ProcessReport, Scored
from rlsys.secrets import blanks
from rlsys.segments import Strategy, scored
from rlsys.types import GroupInfo, RolloutGroup, ScoredGroup, group_info

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

START_TIMEOUT_S = 60.0  # for the actor's process; what the functions take, the worker itself sees to


class RewardActor(Shell):
    """The shell around a `RewardWorker`; calls overlap. Groups are checked before anything is done with them."""

    def __init__(
        self,
        name: str,
        config: RewardsConfig,
        search_path: Sequence[str],
        strategy: Strategy | None,
        on_refused: OnRefused,
    ) -> None:
        self._name = name
        self._arguments = (config, name, search_path)
        self._strategy = strategy
        self._on_refused = on_refused

    async def start(self) -> None:
        # Not in the constructor: Ray reports what that raises as a dead actor, in text only.
        self._worker = RewardWorker(*self._arguments)
        await self._worker.start()

    async def branch(self, rounds: Sequence[Sequence[ObjectRef]]) -> list[Branch]:
        assert self._strategy is not None
        return self._strategy.branch(await self._opened(rounds))

    async def score(
        self, rounds: Sequence[Sequence[ObjectRef]], training: bool
    ) -> tuple[tuple[GroupInfo, float], ScoredGroup]:
        """The driver reads the first of the two; the second stays in the object store. Seconds are of scoring alone."""
        groups = await self._opened(rounds)
        begin = time.monotonic()
        found = await scored(self._strategy if training else None, groups, self._worker.score)
        return (group_info(found.group, found.rewards), time.monotonic() - begin), found

    async def close(self) -> None:
        await self._worker.close()

    async def _opened(self, rounds: Sequence[Sequence[ObjectRef]]) -> list[list[RolloutGroup]]:
        """Ray opens only what is an argument itself."""
        opened = [list(await asyncio.gather(*groups)) for groups in rounds]
        for group in itertools.chain(*opened):
            check_received(group, self._name, self._on_refused)
        return opened


class RayRewarder:
    """A reward worker as the driver sees it (`roles.Rewarder`)."""

    def __init__(self, name: str, actor: ActorHandle[Any], process: Process) -> None:
        self.name = name
        self.actor = actor
        self._process = process
        self._completed = 0

    async def branch(self, rounds: Sequence[Sequence[Handle]]) -> Sequence[Branch]:
        """Raises WorkerDied, SegmentError; BadRollout or RolloutError for a group that cannot be right."""
        branches: list[Branch] = await answer(self.name, self.actor.branch.remote(rounds))
        self._completed += 1
        return branches

    async def score(self, rounds: Sequence[Sequence[Handle]], training: bool) -> Scored:
        """Raises what `branch` does, and what `RewardWorker.score` does."""
        refs: list[Any] = self.actor.score.options(num_returns=2).remote(rounds, training)
        info, seconds = await answer(self.name, refs[0])
        self._completed += 1
        return Scored(info, refs[1], seconds)

    async def progress(self) -> int:
        """Pieces of work that have come back. Raises WorkerDied."""
        await answer(self.name, self.actor.alive.remote())
        return self._completed

    async def inspect(self) -> list[ProcessReport]:
        return [await self._process.report()]

    async def close(self) -> None:
        """End the worker and its child, within 15 s. One that is dead already is closed."""
        await close([self._process], [self.actor.close.remote()])


async def start_rewarder(
    name: str,
    config: RewardsConfig,
    strategy: Strategy | None = None,
    on_refused: OnRefused = "retry",
    place: Mapping[str, Any] = ANYWHERE,
    granted: Collection[str] = (),
) -> RayRewarder:
    """Start a worker and wait until its functions are imported. Raises RewardSetupError, ConfigError, WorkerDied,
    with what the process printed last.

    Its functions are found on the caller's module path and in its working directory. `on_refused` is that of
    `rollout`; `place` are Ray's options for where it runs, and what it claims there; `granted` the keys that the
    worker needs itself, and the functions do not see.
    """
    remote: Any = ray.remote(RewardActor)
    actor: ActorHandle[Any] = remote.options(
        **place,
        max_restarts=0,  # a worker that died is replaced by the driver, which knows what it was doing
        max_task_retries=0,
        runtime_env={"env_vars": blanks(os.environ, {*config.secrets, *granted})},
    ).remote(name, with_absolute_paths(config), default_search_path(), strategy, on_refused)
    process = Process(name, actor)
    async with starting(process):
        try:
            async with asyncio.timeout(START_TIMEOUT_S + config.start_timeout_s):
                await process.locate()
                await answer(name, actor.start.remote())
        except TimeoutError:
            raise WorkerDied(name, "its process does not start, or stands still") from None
    return RayRewarder(name, actor, process)
