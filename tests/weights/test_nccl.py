"""The sender of `weights.engine: nccl`, with TCP in the place of NCCL: what is sent, when, and to whom."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

from rlsys.errors import WeightUpdateError
from rlsys.weights.nccl import Communicator, Sender


class Wire:
    def __init__(self, store: TCPStore) -> None:
        self.store = store

    def broadcast(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for place, (_, tensor) in enumerate(tensors):
            self.store.set(str(place), tensor.numpy().tobytes())


def connect(address: str, port: int, world_size: int) -> Communicator:
    return Wire(TCPStore(address, port, is_master=True, wait_for_workers=False))


def received(meeting: dict, manifest: dict) -> list[np.ndarray]:
    """What a worker at that meeting gets, by the manifest."""
    store = TCPStore(meeting["master_address"], meeting["master_port"], is_master=False)
    return [
        np.frombuffer(store.get(str(place)), dtype=entry["dtype"]).reshape(entry["shape"])
        for place, entry in enumerate(manifest["tensors"])
    ]


@pytest.fixture
def sender() -> Sender:
    return Sender("127.0.0.1", connect)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([7, 8], dtype=torch.int32)}


def test_a_version_arrives_as_it_was_published(sender: Sender, weights: dict[str, Tensor]) -> None:
    manifest = sender.keep(weights.items(), 3)
    assert manifest == {
        "version": 3,
        "bytes": 32,
        "tensors": [
            {"name": "b.weight", "dtype": "float32", "shape": [2, 3], "bytes": 24},
            {"name": "a.bias", "dtype": "int32", "shape": [2], "bytes": 8},
        ],
    }
    weights["b.weight"].zero_()  # the next step
    meeting = sender.meet("generator-0", 1)
    assert meeting["world_size"] == 2
    sender.join("generator-0")
    sender.send("generator-0", 3)
    first, second = received(meeting, manifest)
    np.testing.assert_array_equal(first, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(second, [7, 8])


def test_each_generator_has_its_own_meeting_and_a_restarted_one_a_new_one(
    sender: Sender, weights: dict[str, Tensor]
) -> None:
    manifest = sender.keep(weights.items(), 1)
    meetings = [sender.meet(name, 4) for name in ("generator-0", "generator-1")]
    assert {meeting["world_size"] for meeting in meetings} == {5}
    for name in ("generator-0", "generator-1"):
        sender.join(name)
        sender.send(name, 1)
    again = sender.meet("generator-0", 4)
    assert len({meeting["master_port"] for meeting in [*meetings, again]}) == 3
    with pytest.raises(WeightUpdateError, match="has not met generator-0"):
        sender.send("generator-0", 1)
    sender.send("generator-1", 1)
    sender.join("generator-0")
    sender.send("generator-0", 1)
    assert len(received(again, manifest)) == 2


def test_the_newest_two_are_held(sender: Sender, weights: dict[str, Tensor]) -> None:
    for version in range(4):
        weights["b.weight"].fill_(version)
        manifest = sender.keep(weights.items(), version)
    meeting = sender.meet("generator-0", 1)
    sender.join("generator-0")
    sender.send("generator-0", 2)
    assert (received(meeting, manifest)[0] == 2).all()
    with pytest.raises(WeightUpdateError, match=r"version 1 for generator-0 is no longer held .* which has 2, 3"):
        sender.send("generator-0", 1)


def test_nobody_joins_uninvited(sender: Sender) -> None:
    with pytest.raises(WeightUpdateError, match="generator-5 has not asked"):
        sender.join("generator-5")


def test_a_meeting_that_was_overtaken_by_a_restart_does_not_count(weights: dict[str, Tensor]) -> None:
    def restarted_meanwhile(address: str, port: int, world_size: int) -> Communicator:
        sender.meet("generator-0", 1)
        return connect(address, port, world_size)

    sender = Sender("127.0.0.1", restarted_meanwhile)
    sender.keep(weights.items(), 1)
    sender.meet("generator-0", 1)
    sender.join("generator-0")
    with pytest.raises(WeightUpdateError, match="has not met generator-0"):
        sender.send("generator-0", 1)
