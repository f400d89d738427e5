"""The reference policy as a Ray actor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rlsys.actors.answers import answer_or_death
from rlsys.actors.placement import ANYWHERE
from rlsys.actors.processes import SIGNS, Process, Shell, close, starting
from rlsys.config.models import Config
from rlsys.durable import Files
from rlsys.errors import WorkerDied
from rlsys.models.staging import staged
from rlsys.reference.server import ReferenceServer
from rlsys.roles import Handle, ProcessReport, PublishedWeights
from rlsys.secrets import blanks, of_models
from rlsys.storage import Place, deliver, fetch, let_go
from rlsys.types import ScoredGroup
from rlsys.weights.publish import unpack, verify

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAME = "reference"


class ReferenceActor(Shell):
    """The shell around a `ReferenceServer`; calls are answered one after another, in order of arrival."""

    def start(self, config: Config, model_path: str) -> None:
        # Not in the constructor: Ray reports what that raises as a dead actor, in text only.
        self._server = ReferenceServer(_with_models(config), staged(model_path))

    def logprobs(self, *groups: ScoredGroup) -> tuple[Any, ...]:
        """The driver reads the first (groups scored); the others stay in the object store, one for each group."""
        return (len(groups), *self._server.logprobs(groups))

    def update(self, version: int, manifest: Mapping[str, Any], payload: np.ndarray) -> None:
        verify(payload, manifest)
        self._server.update(unpack(payload, manifest), version)

    def save(self, place: Place) -> Files:
        return deliver(place, self._server.save)

    def load(self, place: Place) -> int:
        version = self._server.load(fetch(place))
        let_go(place)
        return version


class RayReference:
    """The reference policy as the driver sees it (`roles.Reference`)."""

    name = NAME

    def __init__(self, actor: ActorHandle[Any], process: Process) -> None:
        self.actor = actor
        self._process = process
        self._completed = 0

    async def logprobs(self, groups: Sequence[Handle]) -> Sequence[Handle]:
        """Returns when all groups are scored. Raises WorkerDied."""
        refs: list[Any] = self.actor.logprobs.options(num_returns=1 + len(groups)).remote(*groups)
        await self._answer(refs[0])
        return refs[1:]

    async def update(self, weights: PublishedWeights) -> None:
        """Raises WorkerDied, WeightUpdateError for damaged bytes, DataError for the weights of another model."""
        # The payload is an argument of its own because Ray fetches references only when they are arguments themselves.
        await self._answer(self.actor.update.remote(weights.version, weights.manifest, weights.payload))

    async def save(self, place: Place) -> Files:
        """Raises WorkerDied, StorageError."""
        files: Files = await self._answer(self.actor.save.remote(place))
        return files

    async def load(self, place: Place) -> int:
        """Raises WorkerDied, DataError for what does not load, DamagedFileError, StorageError."""
        version: int = await self._answer(self.actor.load.remote(place))
        return version

    async def progress(self) -> int:
        """Raises WorkerDied."""
        await answer_or_death(NAME, self.actor.alive.options(concurrency_group=SIGNS).remote())
        return self._completed

    async def inspect(self) -> list[ProcessReport]:
        return [await self._process.report()]

    async def close(self) -> None:
        """End it, within 15 s. One that is dead already is closed."""
        await close([self._process])

    async def _answer(self, ref: Any) -> Any:
        value = await answer_or_death(NAME, ref)
        self._completed += 1
        return value


def _with_models(config: Config) -> Config:
    """With the reference's models where they are on this node."""
    given = {key: getattr(config.reference, key) for key in ("path", "average_with")}
    here = {key: staged(path) for key, path in given.items() if path is not None}
    return config.model_copy(update={"reference": config.reference.model_copy(update=here)})


async def start_reference(config: Config, model_path: str | Path, place: Mapping[str, Any] = ANYWHERE) -> RayReference:
    """Start the server and wait until its model is loaded. `place` are Ray's options for where it runs.

    Raises DataError for a model that does not load, and WorkerDied when the process ends or is not ready within
    `reference.start_timeout_s`, with what it printed last.
    """
    models = (model_path, config.reference.path, config.reference.average_with)
    options: Any = ray.remote  # whose types do not know concurrency groups
    remote = options(
        **place,
        max_restarts=0,
        max_task_retries=0,
        # see rlsys.actors.learner
        runtime_env={
            "env_vars": {"OMP_WAIT_POLICY": "PASSIVE", **blanks(os.environ, of_models(config.run.storage, *models))}
        },
        concurrency_groups={SIGNS: 1},
    )(ReferenceActor)
    actor: ActorHandle[Any] = remote.remote()
    process = Process(NAME, actor)
    async with starting(process):
        try:
            async with asyncio.timeout(config.reference.start_timeout_s):
                await process.locate()
                await answer_or_death(NAME, actor.start.remote(config, str(model_path)))
        except TimeoutError:
            seconds = config.reference.start_timeout_s
            raise WorkerDied(NAME, f"not ready after {seconds:g} s (reference.start_timeout_s)") from None
    return RayReference(actor, process)
