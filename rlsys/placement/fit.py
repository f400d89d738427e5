"""Workers on nodes. Pure: the same needs and nodes give the same placement.

Packed roles come first, since they leave whole nodes to the others, and then the workers with the most GPUs, which
are the hardest to place. Among the nodes with room for one, a packed
role takes those that it is on already, and first the one with the most room; a spread role takes those with the fewest
of its workers. After that a worker without GPUs keeps off nodes that have some, and the tightest fit wins, so that
large pieces stay free for large workers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rlsys.placement.needs import Need
from rlsys.placement.nodes import GIB, Node

_ORDER = ("strict_pack", "pack", "strict_spread", "spread")


@dataclass(frozen=True, slots=True)
class Placement:
    """`places`: worker -> index of its node. `missing` says why the others have none; empty when all have a place."""

    nodes: Sequence[Node]
    needs: Sequence[Need]
    places: Mapping[str, int]
    missing: Sequence[str]

    def left(self, index: int) -> dict[str, float]:
        """What a node has left when all of these are there; what Ray keeps for itself is not shown."""
        room = _Room([self.nodes[index]])
        for need in self.needs:
            for worker in need.workers:
                if self.places.get(worker) == index:
                    room.take(0, need)
        return {n: a for n, a in room.free[0].items() if not n.startswith("node:") and n != "object_store_memory"}

    def remaining(self) -> list[Node]:
        """The nodes with what they have left when all of these are there."""
        room = _Room(self.nodes)
        for need in self.needs:
            for worker in need.workers:
                if worker in self.places:
                    room.take(self.places[worker], need)
        return [replace(node, free=free) for node, free in zip(self.nodes, room.free, strict=True)]

    def node(self, worker: str) -> Node | None:
        index = self.places.get(worker)
        return None if index is None else self.nodes[index]


class _Room:
    """What is free of every node, while workers are being placed."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.free = [dict(node.free) for node in nodes]

    def holds(self, index: int, need: Need) -> int:
        """How many more workers a node has room for."""
        if not self.nodes[index].has(need.labels):
            return 0
        free = self.free[index]
        amounts = need.resources.items()
        return min((math.floor((free.get(name, 0) + 1e-9) / amount) for name, amount in amounts), default=10**6)

    def take(self, index: int, need: Need) -> None:
        for name, amount in need.resources.items():
            self.free[index][name] -= amount


def fit(needs: Sequence[Need], nodes: Sequence[Node], held: Mapping[str, int | None] | None = None) -> Placement:
    """Place every worker that can be placed, and say what is missing for the others.

    `held`: worker -> index of its node, for those that have a place already (None: nobody knows where). They are not
    placed again, and what they take is not in their node's `free`.
    """
    room, places, missing = _Room(nodes), dict[str, int](), list[str]()
    held = held or {}
    order = sorted(needs, key=lambda n: (_ORDER.index(n.strategy), -n.resources.get("GPU", 0)))
    for need in order:
        wanted = [worker for worker in need.workers if worker not in held]
        here = Counter(index for worker in need.workers if (index := held.get(worker)) is not None)
        placed = _place(need, len(wanted), room, here)
        places |= zip(wanted, placed, strict=False)
        if len(placed) < len(wanted):
            missing.append(_explain(need, len(wanted) - len(placed), room))
    return Placement(nodes, needs, places, missing)


def _place(need: Need, count: int, room: _Room, here: Counter[int]) -> list[int]:
    """The nodes of as many more workers as there is room for, at most `count`, in order."""
    placed: list[int] = []
    only = _one_node(need, room, here) if need.strategy == "strict_pack" else None
    for _ in range(count):
        found = [i for i in range(len(room.nodes)) if room.holds(i, need) and (only is None or i == only)]
        if need.strategy == "strict_spread":
            found = [i for i in found if not here[i]]
        if not found:
            break
        index = min(found, key=lambda i: _cost(need, room, here, i))
        room.take(index, need)
        here[index] += 1
        placed.append(index)
    return placed


def _one_node(need: Need, room: _Room, here: Counter[int]) -> int:
    """The node that they are on, else the one with room for the most of them."""
    return max(range(len(room.nodes)), key=lambda i: (here[i], room.holds(i, need), -i), default=-1)


def _cost(need: Need, room: _Room, here: Counter[int], index: int) -> tuple[float, ...]:
    node, holds = room.nodes[index], room.holds(index, need)
    wasted = 0 if need.resources.get("GPU") else node.total.get("GPU", 0)
    free = room.free[index]
    left = (free.get("GPU", 0) if need.resources.get("GPU") else 0, free.get("CPU", 0))
    if "pack" in need.strategy:
        return (-here[index], wasted, -min(holds, len(need.workers)), *left, index)
    return (here[index], wasted, *left, index)


# ---- what is missing ----


def _explain(need: Need, short: int, room: _Room) -> str:
    asked = len(need.workers)
    what = f"{need.role}: {asked - short} of {asked} workers have a place; each takes {amounts(need.resources)}"
    return f"{what}{_where(need)}. {' '.join(_reasons(need, short, room))}"


def _where(need: Need) -> str:
    labels = ", ".join(f"{key}={value}" for key, value in need.labels.items())
    return f" of a node with {labels}" if labels else ""


def _reasons(need: Need, short: int, room: _Room) -> Iterator[str]:
    right = [node for node in room.nodes if node.has(need.labels)]
    if not right:
        there = sorted({f"{k}={v}" for n in room.nodes for k, v in n.labels.items() if k in need.labels})
        yield f"No node has these labels (there are: {', '.join(there) or 'none of these keys'})."
        return
    unknown = [name for name in need.resources if not any(node.total.get(name) for node in right)]
    for name in unknown:
        yield f"No{' such' if need.labels else ''} node has any {_called(name)}."
    if unknown:
        return
    largest = {name: max(node.total.get(name, 0) for node in right) for name in need.resources}
    if too_big := [name for name, amount in need.resources.items() if amount > largest[name]]:
        yield from (
            f"No node is large enough for one: the largest has {_amount(name, largest[name])} {_called(name)}."
            for name in too_big
        )
        return
    if not any(all(n.total.get(name, 0) >= amount for name, amount in need.resources.items()) for n in right):
        yield f"No single node has all of that; the largest parts are {amounts(largest)}."
        return
    yield from _short_of(need, short, room)


def _short_of(need: Need, short: int, room: _Room) -> Iterator[str]:
    right = [i for i, node in enumerate(room.nodes) if node.has(need.labels)]
    if need.strategy == "strict_spread" and len(right) < len(need.workers):
        yield f"strict_spread puts each on a node of its own, and there are {len(right)} nodes for them."
        return
    if need.strategy == "strict_pack":
        most = max(_Room([room.nodes[i]]).holds(0, need) for i in right)
        yield f"strict_pack puts all of them on one node; the best has room for {most} as it is."
        return
    for name, amount in need.resources.items():
        left = sum(room.free[i].get(name, 0) for i in right)
        total = sum(room.nodes[i].total.get(name, 0) for i in right)
        if left < amount * short - 1e-9:
            yield (
                f"{_amount(name, amount * short - left)} more {_called(name)} are needed: of {_amount(name, total)}, "
                f"{_amount(name, left)} are left for them."
            )
            return
    parts = "; ".join(f"{room.nodes[i].name}: {amounts(room.free[i], need.resources) or 'nothing'}" for i in right[:6])
    yield f"What is left is in pieces that are too small ({parts}{'; ...' if len(right) > 6 else ''})."


def amounts(resources: Mapping[str, float], names: Mapping[str, float] | None = None) -> str:
    """`8 CPUs, 1 GPU, 16 GiB of memory`."""
    shown = {name: resources.get(name, 0) for name in names} if names is not None else resources
    return ", ".join(f"{_amount(name, amount)} {_called(name, amount)}" for name, amount in shown.items()) or "nothing"


def _amount(name: str, amount: float) -> str:
    return f"{amount / GIB if name == 'memory' else amount:.4g}"


def _called(name: str, amount: float = 2.0) -> str:
    if name == "memory":
        return "GiB of memory"
    if name in ("CPU", "GPU"):
        return name if amount == 1 else f"{name}s"
    return f"of {name!r}"
