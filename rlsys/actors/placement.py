"""Places on a Ray cluster: one placement group a worker, on the node that `rlsys.placement.fit` has chosen.

All that a run starts with are made at once, and either all of them are there within the deadline or none is kept. A
worker that is restarted has the place that the one before had; when its node is lost, Ray finds another. One that joins
later has its place made then, and one that leaves gives it back; whether there is room is asked before anything is
changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.errors import PlacementError
from rlsys.placement.fit import Placement, amounts, fit
from rlsys.placement.needs import Need
from rlsys.placement.nodes import Node

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

ANYWHERE: Mapping[str, Any] = {"num_cpus": 0}  # for an actor that claims nothing
_NODES = 16  # in a message
READY_S = 30.0  # for Ray to make groups that there is room for
_ADVICE = (
    "Ask for less (the sizes, or resources.roles), free the cluster, or set resources.placement_timeout_s to wait for "
    "nodes that an autoscaler adds"
)


def nodes_of_cluster() -> list[Node]:
    """The nodes of the cluster that this process has joined, as they are now."""
    from ray._private.state import available_resources_per_node  # there is no public way to ask

    free = available_resources_per_node()
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"],
            free.get(node["NodeID"], {}),
            node.get("Labels", {}),
            node["NodeID"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


class Places:
    """Where the workers of a run are. `timeout_s`: how long to wait for room."""

    def __init__(self, needs: Sequence[Need], timeout_s: float) -> None:
        self._needs = {need.role: need for need in needs}
        self._timeout_s = timeout_s
        self._groups: dict[str, tuple[PlacementGroup, Need]] = {}

    async def reserve(self) -> None:
        """Make the places of all that the run starts with. Raises PlacementError."""
        await self._make(list(self._needs.values()))

    async def options(self, worker: str) -> dict[str, Any]:
        """How to start the actor of a worker: at its place, which is made if there is none. Raises PlacementError."""
        if worker not in self._groups:
            role = worker.partition("-")[0]
            await self._make([replace(self._needs[role], workers=(*self._held_by(role), worker))])
        return _options(*self._groups[worker])

    def check(self, needs: Sequence[Need]) -> None:
        """Whether the roles may have these workers from now on, on the cluster as it stands. Changes nothing.

        What a role gives back is for its own workers only. Generators and reward workers may be without a place where
        a `timeout_s` lets an autoscaler work; the learner may not, since nothing is trained while it waits. Raises
        PlacementError.
        """
        nodes = nodes_of_cluster()
        for need in sorted(needs, key=lambda need: need.role == "learner"):  # last: what it gives back is for it alone
            if need.role != "learner":
                need = replace(self._needs[need.role], workers=need.workers)  # each claims what those before claimed
            placement, _ = self._change(need, nodes)
            if placement.missing and (need.role == "learner" or not self._timeout_s):
                found = describe(placement)
                raise PlacementError(f"the cluster has no room for that:\n{found}\nAsk for less, or free the cluster")
            nodes = placement.remaining()

    async def resize(self, need: Need) -> list[dict[str, Any]]:
        """Have places for these workers of a role and for no others; returns the options of each.

        They have ended. Does not wait for an autoscaler: raises PlacementError, and what was given back is gone.
        """
        placement, leaving = self._change(need, nodes_of_cluster())
        if placement.missing:
            raise PlacementError(f"the cluster has no room any more:\n{describe(placement)}")
        self._needs[need.role] = need
        for worker in leaving:
            self.release(worker)
        await self._create(placement, READY_S)
        return [_options(*self._groups[worker]) for worker in need.workers]

    def release(self, worker: str) -> None:
        """Give back the place of a worker that has left, if it has one."""
        if held := self._groups.pop(worker, None):
            remove_placement_group(held[0])

    def _held_by(self, role: str) -> list[str]:
        return [worker for worker, (_, need) in self._groups.items() if need.role == role]

    def _change(self, need: Need, nodes: Sequence[Node]) -> tuple[Placement, list[str]]:
        """Where the new workers of a role would go, and which of its old ones give their places back for that."""
        held = self._held_by(need.role)
        leaving = [w for w in held if w not in need.workers or self._groups[w][1].resources != need.resources]
        placement = self._without(leaving, need, nodes)
        if placement.missing and need.role == "learner" and need.strategy == "strict_pack":
            anew = self._without(held, need, nodes)  # all of them on another node
            if not anew.missing:
                return anew, held
        return placement, leaving

    def _without(self, leaving: Sequence[str], need: Need, nodes: Sequence[Node]) -> Placement:
        """The new places of a role when these workers have given theirs back."""
        where = self._nodes([need], nodes)
        free = [dict(node.free) for node in nodes]
        for worker in leaving:
            if (index := where[worker]) is not None:
                for name, amount in self._groups[worker][1].resources.items():
                    free[index][name] = free[index].get(name, 0.0) + amount
        given = [replace(node, free=has) for node, has in zip(nodes, free, strict=True)]
        return fit([need], given, {w: index for w, index in where.items() if w not in leaving})

    def _nodes(self, needs: Sequence[Need], nodes: Sequence[Node]) -> dict[str, int | None]:
        """The workers of these roles that have a place, with the index of its node, as Ray says."""
        indices = {node.id: index for index, node in enumerate(nodes)}
        there = [worker for need in needs for worker in self._held_by(need.role)]
        return {worker: indices.get(_node(self._groups[worker][0])) for worker in there}

    async def _make(self, needs: Sequence[Need]) -> None:
        """Make a place for every worker that has none, or, when there is no room for all of them, for none."""
        placement = self._fitted(needs)
        if placement.missing and not self._timeout_s:
            raise PlacementError(f"the cluster has no room for the run:\n{describe(placement)}\n{_ADVICE}")
        await self._create(placement, self._timeout_s if placement.missing else READY_S)

    def _fitted(self, needs: Sequence[Need]) -> Placement:
        nodes = nodes_of_cluster()
        return fit(needs, nodes, self._nodes(needs, nodes))

    async def _create(self, placement: Placement, limit: float) -> None:
        """Have Ray make the places within so many seconds, or none of them."""
        # Those without a node are asked for as well: that is how an autoscaler hears of them.
        made = {
            worker: (_group(worker, need, placement.node(worker)), need)
            for need in placement.needs
            for worker in need.workers
            if worker not in self._groups
        }
        try:
            late = await _not_ready({worker: group for worker, (group, _) in made.items()}, limit)
            if late and placement.missing:
                now = describe(self._fitted(placement.needs))
                waited = f"after {limit:g} s (resources.placement_timeout_s)"
                raise PlacementError(f"the cluster has no room for the run {waited}:\n{now}\n{_ADVICE}")
            if late:
                raise PlacementError(f"Ray did not place {', '.join(late)} within {limit:g} s, where there was room")
        except BaseException:
            for group, _ in made.values():
                remove_placement_group(group)
            raise
        self._groups |= made


def describe(placement: Placement) -> str:
    """What is missing, and what every node has left."""
    nodes = "\n".join(
        f"  {node.name}: {amounts(node.free, _shown(node))} left of {amounts(node.total, _shown(node))}"
        for node in placement.nodes[:_NODES]
    )
    if len(placement.nodes) > _NODES:
        nodes += f"\n  and {len(placement.nodes) - _NODES} more"
    missing = "\n".join(f"  {line}" for line in placement.missing)
    return f"{missing}\nIts nodes:\n{nodes or '  none'}"


def _shown(node: Node) -> dict[str, float]:
    """Not what Ray adds for itself."""
    return {n: a for n, a in node.total.items() if not n.startswith("node:") and n != "object_store_memory"}


def _group(worker: str, need: Need, node: Node | None) -> PlacementGroup:
    return placement_group(
        [dict(need.resources)],
        strategy="STRICT_PACK",
        name=worker,
        bundle_label_selector=[dict(need.labels)] if need.labels else None,
        _soft_target_node_id=node.id if node else None,
    )


def _node(group: PlacementGroup) -> str:
    """The id of the node where it is; empty when it is nowhere."""
    return str(placement_group_table(group).get("bundles_to_node_id", {}).get(0, ""))


async def _not_ready(groups: Mapping[str, PlacementGroup], timeout_s: float) -> list[str]:
    """The workers whose places are not there in time."""
    deadline = time.monotonic() + timeout_s
    late = dict(groups)
    for worker, group in groups.items():
        while worker in late:
            # Not longer at once: a thread cannot be cancelled.
            left = min(1.0, deadline - time.monotonic())
            if await asyncio.to_thread(group.wait, max(0.0, left)):
                del late[worker]
            elif left <= 0:
                break
    return list(late)


def _options(group: PlacementGroup, need: Need) -> dict[str, Any]:
    claims = dict(need.resources)
    options: dict[str, Any] = {"num_cpus": claims.pop("CPU", 0), "num_gpus": claims.pop("GPU", 0)}
    if memory := claims.pop("memory", 0):
        options["memory"] = int(memory)
    return options | {"resources": claims, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}
