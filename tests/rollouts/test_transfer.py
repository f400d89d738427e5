"""`weights.engine: nccl` on the generator's side, with an engine and a sender that only listen to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from rlsys.errors import WeightUpdateError
from rlsys.roles import Probe, PublishedWeights
from rlsys.rollouts.transfer import Broadcast

MEETING = {"master_address": "10.0.0.1", "master_port": 29500, "world_size": 3}
MANIFEST = {"version": 4, "bytes": 12, "tensors": [{"name": "a", "dtype": "float32", "shape": [3], "bytes": 12}]}


class Pair:
    """Sender and engine: what both do at once only ends when both are there."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.joining, self.sending = asyncio.Barrier(2), asyncio.Barrier(2)

    async def meet(self, generator: str, workers: int) -> Mapping[str, Any]:
        self.said.append(("meet", generator, workers))
        return MEETING

    async def join(self, generator: str) -> None:
        await self.joining.wait()

    async def send(self, generator: str, version: int) -> None:
        if version == 13:
            raise WeightUpdateError("version 13 is no longer held")
        await self.sending.wait()
        self.said.append(("sent", generator, version))

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self.joining.wait()
        self.said.append(("init", request.init_info))

    async def start_weight_update(self) -> None:
        self.said.append("start")

    async def update_weights(self, request: Any) -> None:
        await self.sending.wait()
        self.said.append(("received", request.update_info["names"]))

    async def finish_weight_update(self, weight_version: str) -> None:
        self.said.append(("finish", weight_version))


async def update(transfer: Broadcast, pair: Any, version: int) -> None:
    weights = PublishedWeights(version, MANIFEST, pair, Probe((1, 2), (-1.0,)))
    with transfer.staged(weights) as staged:
        async with asyncio.timeout(60):
            await transfer.load(pair, weights, staged)


@pytest.mark.slow  # vLLM is imported
async def test_they_meet_once_and_receive_while_the_other_sends() -> None:
    pair, transfer = Pair(), Broadcast("generator-1", 2)
    await update(transfer, pair, 4)
    assert pair.said[:3] == [
        ("meet", "generator-1", 2),
        ("init", {**MEETING, "rank_offset": 1, "packed": True}),
        "start",
    ]
    assert sorted(pair.said[3:5]) == [("received", ["a"]), ("sent", "generator-1", 4)]
    assert pair.said[5] == ("finish", "4")
    await update(transfer, pair, 5)
    assert pair.said[6] == "start"  # no second meeting


@pytest.mark.slow
async def test_what_the_sender_refuses_is_not_waited_for() -> None:
    pair, transfer = Pair(), Broadcast("generator-1", 2)
    await update(transfer, pair, 4)
    with pytest.raises(WeightUpdateError, match="no longer held"):
        await update(transfer, pair, 13)
    assert pair.said[-1] == "start"  # not finished: the engine is to be ended
