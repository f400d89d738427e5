"""Start every role of a run as Ray actors, and end them all again.

`start_roles` is the only place that knows where things run. It gives the driver a `Roles`, which has no trace of Ray
in it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray

from rlsys.actors.generator import start_generator
from rlsys.actors.learner import start_learner
from rlsys.actors.reference import start_reference
from rlsys.actors.rewards import start_rewarder
from rlsys.algorithms.compose import Algorithm
from rlsys.algorithms.rollout import bound_strategy
from rlsys.config.models import Config
from rlsys.errors import first_of
from rlsys.ledger.store import RolloutStore
from rlsys.roles import Roles

CLOSE_TIMEOUT_S = 20.0


def start_cluster(config: Config) -> None:
    """Join the configured Ray cluster, or start a private one on this machine."""
    # Ray reports its use over the network unless told otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": f"rlsys-{config.run.name}"}
    if config.resources.ray_address is not None:
        ray.init(address=config.resources.ray_address, **common)
        return
    workers = config.rollout.generators + config.learner.ranks + config.rewards.workers + 1
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(workers, config.resources.cores or os.cpu_count() or 1),
        object_store_memory=int(config.resources.object_store_gib * 2**30),
        **common,
    )


async def fetch(handle: Any) -> Any:
    """The value behind a handle."""
    return await handle if isinstance(handle, ray.ObjectRef) else handle


async def put(value: Any) -> Any:
    """A handle of a value."""
    return ray.put(value)


@asynccontextmanager
async def start_roles(config: Config, model_path: Path, run_dir: Path) -> AsyncIterator[Roles]:
    """All roles of a run, started side by side; closed, and the private cluster ended, on the way out.

    Raises the first role's failure, after closing those that had started.
    """
    algorithm = Algorithm.from_config(config.algorithm)
    needs, strategy = algorithm.needs, bound_strategy(algorithm, config, model_path)
    start_cluster(config)
    started: list[Any] = []

    async def keep(starting: Awaitable[Any]) -> Any:
        role = await starting
        started.append(role)
        return role

    async def spawn_generator(name: str) -> Any:
        return await keep(start_generator(name, config, model_path))

    async def spawn_rewarder(name: str) -> Any:
        return await keep(start_rewarder(name, config.rewards, strategy, config.rollout.on_refused))

    try:
        try:
            async with asyncio.TaskGroup() as group:

                def begin(starting: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
                    return group.create_task(starting)

                learner = begin(keep(start_learner(config, model_path)))
                generators = [begin(spawn_generator(f"generator-{i}")) for i in range(config.rollout.generators)]
                rewarders = [begin(spawn_rewarder(f"rewarder-{i}")) for i in range(config.rewards.workers)]
                reference = begin(keep(start_reference(config, model_path))) if needs.reference else None
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        yield Roles(
            generators=[task.result() for task in generators],
            rewarders=[task.result() for task in rewarders],
            learner=learner.result(),
            reference=reference.result() if reference else None,
            store=RolloutStore(run_dir / "rollouts", fetch, put),
            spawn_generator=spawn_generator,
            spawn_rewarder=spawn_rewarder,
        )
    finally:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await asyncio.gather(*(role.close() for role in started), return_exceptions=True)
        ray.shutdown()
