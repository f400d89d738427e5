"""The reference policy as a Ray actor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from rlsys.config.models import Config
from rlsys.errors import WorkerDied
from rlsys.reference.server import ReferenceServer
from rlsys.roles import Handle
from rlsys.types import ScoredGroup

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NAME = "reference"


class ReferenceActor:
    """The shell around a `ReferenceServer`; groups are scored one after another, in order of arrival."""

    def start(self, config: Config, model_path: str) -> None:
        # Not in the constructor: Ray reports what that raises as a dead actor, in text only.
        self._server = ReferenceServer(config, model_path)

    def logprobs(self, group: ScoredGroup) -> tuple[int, tuple[np.ndarray, ...]]:
        """The driver reads the first of the two (rollouts scored); the second stays in the object store."""
        arrays = self._server.logprobs(group)
        return len(arrays), arrays


class RayReference:
    """The reference policy as the driver sees it (`roles.Reference`)."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.actor = actor

    async def logprobs(self, group: Handle) -> Handle:
        """Returns when the group is scored. Raises WorkerDied."""
        refs: list[Any] = self.actor.logprobs.options(num_returns=2).remote(group)
        try:
            await refs[0]
        except RayActorError as error:
            raise WorkerDied(NAME, str(error).splitlines()[0]) from error
        return refs[1]

    async def close(self) -> None:
        ray.kill(self.actor)


async def start_reference(config: Config, model_path: Path) -> RayReference:
    """Start the server and wait until its model is loaded.

    Raises DataError for a model that does not load, and WorkerDied when the process ends or is not ready within
    `reference.start_timeout_s`.
    """
    remote: Any = ray.remote(
        num_cpus=0,
        num_gpus=1 if config.profile == "gpu" else 0,
        max_restarts=0,
        max_task_retries=0,
        runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},  # see rlsys.actors.learner
    )(ReferenceActor)
    actor: ActorHandle[Any] = remote.remote()
    try:
        async with asyncio.timeout(config.reference.start_timeout_s):
            await actor.start.remote(config, str(model_path))
    except RayActorError as error:
        raise WorkerDied(NAME, str(error).splitlines()[0]) from error
    except TimeoutError:
        ray.kill(actor)
        seconds = config.reference.start_timeout_s
        raise WorkerDied(NAME, f"not ready after {seconds:g} s (reference.start_timeout_s)") from None
    except BaseException:
        ray.kill(actor)
        raise
    return RayReference(actor)
