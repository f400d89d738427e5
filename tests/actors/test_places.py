"""Places on a real cluster of three raylets, whose nodes have GPUs in name only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from rlsys.actors.placement import Places, nodes_of_cluster
from rlsys.errors import PlacementError
from rlsys.placement.fit import fit
from rlsys.placement.needs import Need, Strategy, worker_names

pytestmark = pytest.mark.slow

SMALL = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 4, "include_dashboard": False})
    try:
        cluster.add_node(**SMALL, num_cpus=4, num_gpus=4, labels={"pool": "gpu"})
        cluster.add_node(**SMALL, num_cpus=4, num_gpus=4, labels={"pool": "gpu"}, resources={"sandbox": 2})
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def need(
    role: str, count: int, strategy: Strategy = "spread", labels: dict[str, str] | None = None, **takes: float
) -> Need:
    return Need(role, worker_names(role, count), takes, labels or {}, strategy)


class Where:
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def gpus(self) -> int:
        return len(ray.get_gpu_ids())


async def started(places: Places, worker: str) -> Any:
    remote: Any = ray.remote(Where)
    return remote.options(**await places.options(worker)).remote()


def free(resource: str) -> float:
    return sum(node.free.get(resource, 0) for node in nodes_of_cluster())


async def until_free(resource: str, amount: float) -> None:
    """Ray takes its time to say so."""
    async with asyncio.timeout(30):
        while free(resource) != amount:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.1)


async def test_workers_are_where_the_plan_has_them(cluster: Cluster) -> None:
    needs = [
        need("learner", 2, "strict_pack", CPU=1.0, GPU=1.0),
        need("generator", 2, CPU=0.5, GPU=2.0),
        need("rewarder", 2, CPU=1.0),
        need("reference", 1, CPU=0.5, sandbox=1.0),
    ]
    planned = fit(needs, nodes_of_cluster())
    assert not planned.missing
    places = Places(needs, timeout_s=0)
    await places.reserve()
    assert free("GPU") == 2, "they are claimed before anything is started"
    for asked in needs:
        for worker in asked.workers:
            actor = await started(places, worker)
            node = planned.node(worker)
            assert node is not None
            assert await actor.node.remote() == node.id, worker
            assert await actor.gpus.remote() == asked.resources.get("GPU", 0)
            ray.kill(actor)
            again = await started(places, worker)
            assert await again.node.remote() == node.id, f"{worker} comes back to its place"
            ray.kill(again)
    for asked in needs:
        for worker in asked.workers:
            places.release(worker)
    await until_free("GPU", 8)


async def test_one_that_joins_later_has_a_place_and_the_learner_can_be_resized(cluster: Cluster) -> None:
    learner = need("learner", 4, "pack", CPU=1.0, GPU=1.0)
    places = Places([learner, need("generator", 1, GPU=2.0)], timeout_s=0)
    await places.reserve()
    actor = await started(places, "generator-1")
    assert await actor.gpus.remote() == 2
    ray.kill(actor)
    places.release("generator-1")
    await until_free("GPU", 2)
    with pytest.raises(PlacementError, match=r"(?s)learner: 6 of 8 .*2 more GPUs are needed: of 8, 0 are left"):
        await places.resize(replace(learner, workers=worker_names("learner", 8)))
    assert len(await places.resize(replace(learner, workers=worker_names("learner", 2)))) == 2
    await until_free("GPU", 4)
    for worker in ("generator-0", "learner-0", "learner-1"):
        places.release(worker)
    await until_free("GPU", 8)


async def test_a_run_that_does_not_fit_keeps_nothing(cluster: Cluster) -> None:
    too_much = [need("learner", 2, CPU=1.0, GPU=1.0), need("generator", 3, CPU=1.0, GPU=3.0)]
    with pytest.raises(
        PlacementError, match=r"(?s)generator: 2 of 3 .*Its nodes:.*3 CPUs.* left of 4 CPUs|no room"
    ) as caught:
        await Places(too_much, timeout_s=0).reserve()
    assert "resources.placement_timeout_s" in str(caught.value)
    with pytest.raises(PlacementError, match=r"after 1 s"):
        await Places(too_much, timeout_s=1).reserve()
    await until_free("GPU", 8)


async def test_room_that_comes_in_time_is_taken(cluster: Cluster) -> None:
    places = Places([need("generator", 3, GPU=4.0)], timeout_s=60)
    waiting = asyncio.ensure_future(places.reserve())
    await asyncio.sleep(0)
    node = cluster.add_node(**SMALL, num_cpus=1, num_gpus=4)  # not in a thread: it takes signals
    await waiting
    for worker in worker_names("generator", 3):
        places.release(worker)
    cluster.remove_node(node)


@pytest.mark.parametrize("selector", ["gpu", "!gpu", "in(cpu,gpu)", "!in(gpu,tpu)"])
async def test_ray_selects_labels_as_the_plan_does(cluster: Cluster, selector: str) -> None:
    right = {node.id for node in nodes_of_cluster() if node.has({"pool": selector})}
    assert 0 < len(right) < len(nodes_of_cluster())
    places = Places([need("rewarder", 2, labels={"pool": selector}, CPU=0.5)], timeout_s=0)
    await places.reserve()
    for worker in worker_names("rewarder", 2):
        actor = await started(places, worker)
        assert await actor.node.remote() in right
        ray.kill(actor)
        places.release(worker)


async def test_room_is_looked_for_before_anything_changes(cluster: Cluster) -> None:
    """Of 8 GPUs the learner has 4 and a generator 2."""
    learner, generator = need("learner", 4, "pack", CPU=1.0, GPU=1.0), need("generator", 1, GPU=2.0)
    places = Places([learner, generator], timeout_s=0)
    await places.reserve()
    await until_free("GPU", 2)

    def ranks(count: int, gpus: float = 1.0) -> Need:
        return replace(learner, workers=worker_names("learner", count), resources={"CPU": 1.0, "GPU": gpus})

    def generators(count: int) -> Need:
        return replace(generator, workers=worker_names("generator", count), resources={"GPU": 0.5})

    for fits in ([ranks(6)], [ranks(3, gpus=2.0)], [ranks(2)], [generators(2)], [generators(2), ranks(2)]):
        places.check(fits)
    for fits_not, said in (
        ([ranks(7)], r"learner: 6 of 7 workers .*1 more GPUs are needed: of 8, 0 are left"),
        ([ranks(4, gpus=2.0)], r"learner: 3 of 4 workers have a place; each takes 1 CPU, 2 GPUs"),
        ([generators(3)], r"generator: 2 of 3 workers have a place; each takes 2 GPUs"),
        ([ranks(5), generators(2)], r"learner: 4 of 5 workers"),
        # what the learner gives back comes too late for them
        ([ranks(2), generators(3)], r"generator: 2 of 3 workers"),
    ):
        with pytest.raises(PlacementError, match=rf"(?s)no room for that:.*{said}.*Its nodes:.* left of .* GPUs"):
            places.check(fits_not)
    waits = Places([learner, generator], timeout_s=900)
    waits._groups = places._groups
    waits.check([generators(3)])
    with pytest.raises(PlacementError, match="learner: 6 of 7"):
        waits.check([ranks(7)])
    assert free("GPU") == 2, "nothing has changed"
    assert len(await places.resize(ranks(3, gpus=2.0))) == 3, "with what the others give back"
    await until_free("GPU", 0)
    with pytest.raises(PlacementError, match="no room any more"):
        await places.resize(ranks(4, gpus=2.0))
    assert len(await places.resize(ranks(3, gpus=2.0))) == 3
    for worker in ("generator-0", *worker_names("learner", 3)):
        places.release(worker)
    await until_free("GPU", 8)


async def test_a_learner_on_one_node_moves_to_another_as_a_whole(cluster: Cluster) -> None:
    learner = need("learner", 2, "strict_pack", CPU=1.0, GPU=1.0)

    def left() -> list[float]:
        return sorted(node.free.get("GPU", 0) for node in nodes_of_cluster() if node.total.get("GPU"))

    places = Places([learner], timeout_s=0)
    await places.reserve()
    other = Places([need("generator", 1, GPU=1.0)], timeout_s=0)
    await other.reserve()  # beside it, where the fit is tightest
    await until_free("GPU", 5)
    assert left() == [1, 4]
    larger = replace(learner, workers=worker_names("learner", 4))
    places.check([larger])
    assert len(await places.resize(larger)) == 4
    await until_free("GPU", 3)
    assert left() == [0, 3]
    for worker in larger.workers:
        places.release(worker)
    other.release("generator-0")
    await until_free("GPU", 8)
