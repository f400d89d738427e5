"""The means to start every role of a run as Ray actors, and their end.

`start_roles` is the only place that knows where things run. It gives the driver a `Roles`, which has no trace of Ray
in it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from rlsys.actors import processes
from rlsys.actors.generator import start_generator
from rlsys.actors.learner import start_learner
from rlsys.actors.placement import Places, nodes_of_cluster
from rlsys.actors.processes import first_line
from rlsys.actors.reference import start_reference
from rlsys.actors.rewards import start_rewarder
from rlsys.algorithms.compose import Algorithm
from rlsys.algorithms.rollout import bound_strategy
from rlsys.config.models import Config
from rlsys.config.plan import Facts, Plan, make_plan, this_machine
from rlsys.errors import ClusterError, EngineError, HandleLost
from rlsys.ledger.store import RolloutStore
from rlsys.placement.needs import Need, needs_of
from rlsys.placement.nodes import Node
from rlsys.roles import Roles
from rlsys.secrets import of_models

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 60.0  # for what is there already, on whatever node
LINGER_S = 0.03  # scored groups of this long are written together


def start_cluster(config: Config) -> None:
    """Join the configured Ray cluster, or start a private one on this machine."""
    # Ray reports its use over the network unless told otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    namespace = f"rlsys-{config.run.name}"
    if config.resources.ray_address is not None:
        join(config.resources.ray_address, namespace=namespace)
        return
    claimed = sum(need.resources.get("CPU", 0) * len(need.workers) for need in needs(config))
    cores = config.resources.cores or os.cpu_count() or 1
    ray.init(
        address="local",
        include_dashboard=False,
        # Whether the machine is large enough is the plan's affair: workers take turns where it has fewer cores. As
        # much again as it has is for those that join later.
        num_cpus=max(math.ceil(claimed), cores) + cores,
        object_store_memory=int(config.resources.object_store_gib * 2**30),
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace=namespace,
    )


def looked_at(address: str) -> list[Node]:
    """The nodes of a live cluster, which is left again. Raises ClusterError when there is none at the address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    join(address, namespace="rlsys-plan")
    try:
        return nodes_of_cluster()
    finally:
        ray.shutdown()


def join(address: str, **options: Any) -> None:
    """Raises ClusterError, which names the address."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster can be joined at {address!r} (resources.ray_address): {str(error).splitlines()[0]}"
        ) from error


def needs(config: Config) -> list[Need]:
    """What the roles of a run claim."""
    return needs_of(config, _planned(config).roles)


def _planned(config: Config) -> Plan:
    algorithm = Algorithm.from_config(config.algorithm)
    asked = algorithm.needs
    facts = Facts(
        minibatches=algorithm.minibatches,
        needs_reference=asked.reference,
        needs_critic=asked.values,
        needs_samples=asked.samples,
        needs_expert=asked.expert,
    )
    return make_plan(config, facts, this_machine(config))


def fetch(handles: Sequence[Any]) -> list[Any]:
    """The values behind handles, for which it waits; in the place of one that is gone, a HandleLost.

    Raises EngineError when they do not come.
    """
    try:
        return list(ray.get(list(handles), timeout=FETCH_TIMEOUT_S))
    except GetTimeoutError:
        raise EngineError(f"a node did not hand on what it holds within {FETCH_TIMEOUT_S:g} s") from None
    except ObjectLostError as error:
        if len(handles) == 1:
            return [HandleLost(f"the driver cannot have what it was given: {first_line(error)}")]
        return [value for handle in handles for value in fetch([handle])]


async def put(value: Any) -> Any:
    """A handle of a value."""
    return ray.put(value)


def absolute_folder(path: str | Path) -> str:
    """Where a folder is for everybody; the name of a model on the hub, or a URL, stays what it is."""
    return str(Path(path).absolute() if Path(path).is_dir() else path)


def with_absolute_folders(config: Config) -> Config:
    """The config with the reference's models where everybody finds them."""
    models = {key: getattr(config.reference, key) for key in ("path", "average_with")}
    found = {key: absolute_folder(value) for key, value in models.items() if value is not None}
    return config.model_copy(update={"reference": config.reference.model_copy(update=found)})


@asynccontextmanager
async def start_roles(config: Config, model_path: str | Path, run_dir: Path) -> AsyncIterator[Roles]:
    """The means to start the roles of a run. Whatever was started is closed, and the private cluster ended, on the way
    out."""
    # Actors on other nodes, and those of a cluster that was there before, have other working directories.
    config, model_path = with_absolute_folders(config), absolute_folder(model_path)
    algorithm = Algorithm.from_config(config.algorithm)
    strategy = bound_strategy(algorithm, config, model_path)
    start_cluster(config)
    places = Places(needs(config), config.resources.placement_timeout_s)
    started: dict[str, Any] = {}  # the newest of each name: the driver has ended the others

    async def keep(starting: Awaitable[Any]) -> Any:
        role = await starting
        started[role.name] = role
        return role

    async def spawn_generator(name: str) -> Any:
        return await keep(start_generator(name, config, model_path, place=await places.options(name)))

    async def spawn_rewarder(name: str) -> Any:
        place = await places.options(name)
        granted = of_models(model_path) if strategy.branches else ()  # for its tokenizer
        return await keep(start_rewarder(name, config.rewards, strategy, config.rollout.on_refused, place, granted))

    async def spawn_learner(shape: Config) -> Any:
        [need] = [need for need in needs(shape) if need.role == "learner"]
        return await keep(start_learner(shape, model_path, places=await places.resize(need)))

    def check_room(shape: Config) -> None:
        plan = _planned(shape)
        plan.check()
        places.check(needs_of(shape, plan.roles))

    async def spawn_reference() -> Any:
        return await keep(start_reference(config, model_path, await places.options("reference")))

    try:
        await places.reserve()
        yield Roles(
            store=RolloutStore(run_dir / "rollouts", fetch, put, LINGER_S),
            spawn_generator=spawn_generator,
            spawn_rewarder=spawn_rewarder,
            spawn_learner=spawn_learner,
            spawn_reference=spawn_reference if algorithm.needs.reference else None,
            release=places.release,
            check_room=check_room,
        )
    finally:
        await end_cluster(list(started.values()))


async def end_cluster(roles: Sequence[Any]) -> None:
    """Close the roles, end whatever else was started on the cluster, and leave it; a private one ends.

    Takes at most 30 s. When it is cancelled, nothing is given time to close any more.
    """
    try:
        for failure in await asyncio.gather(*(role.close() for role in roles), return_exceptions=True):
            if failure is not None:  # not raised: it would hide the failure that led here
                logger.error("a role could not be closed", exc_info=failure)
    finally:
        try:
            await processes.end_all()
        finally:
            ray.shutdown()
