"""Weights over NCCL (`weights.engine: nccl`, GPU profile), received by vLLM's own engine.

    learner, rank 0    keep: a snapshot of the tensors at every publication; training goes on meanwhile
    generator          meet, join: once in the life of a generator, a communicator of the sender and its workers
                       send: the sender broadcasts one version while vLLM receives it

One generator at a time, as with every engine of ours: a communicator per generator, so that one which dies or is
restarted takes no other with it. There is no checksum of a broadcast; the probe of `PublishedWeights` verifies it.

**Not run over NCCL yet**: written from the source of vLLM 0.32 (`vllm.distributed.weight_transfer`) on machines without
a GPU. What runs in the tests is everything but `connect`.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rlsys.errors import WeightUpdateError

if TYPE_CHECKING:
    from torch import Tensor

BACKEND = "nccl"
SNAPSHOTS = 2  # the newest, and the one before it: it may be under way to a generator when the next is published


class Communicator(Protocol):
    def broadcast(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Send tensors to all workers, in order; return when they are on their way and may be changed."""
        ...


Connect = Callable[[str, int, int], Communicator]  # (address, port, world size), as rank 0; blocks until all are there


class WeightSender(Protocol):
    """How a generator reaches the sender; it is the payload of weights that go over NCCL."""

    async def meet(self, generator: str, workers: int) -> Mapping[str, Any]:
        """Where that generator's workers are to meet the sender: `master_address`, `master_port`, `world_size`."""
        ...

    async def join(self, generator: str) -> None:
        """Take part in that meeting; returns when the communicator stands."""
        ...

    async def send(self, generator: str, version: int) -> None:
        """Broadcast a version to a generator that is receiving."""
        ...


class Sender:
    """Of the learner's rank 0. `keep` is called between steps, the others from other threads at any time."""

    def __init__(self, address: str, connect: Connect) -> None:
        """`address` is where generators can reach this machine."""
        self._address = address
        self._connect = connect
        self._lock = threading.Lock()
        self._snapshots: dict[int, list[tuple[str, Tensor]]] = {}
        self._meetings: dict[str, tuple[int, int]] = {}  # generator -> port, world size
        self._communicators: dict[str, Communicator] = {}

    def keep(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> dict[str, Any]:
        """Copy full tensors, on the device where they are; return the manifest, with no checksum in it."""
        import torch

        snapshot = [(name, tensor.detach().clone()) for name, tensor in named_tensors]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the broadcast runs on another stream
        table: list[dict[str, Any]] = [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": tensor.numel() * tensor.element_size(),
            }
            for name, tensor in snapshot
        ]
        with self._lock:
            self._snapshots[version] = snapshot
            for old in sorted(self._snapshots)[:-SNAPSHOTS]:
                del self._snapshots[old]
        return {"version": version, "bytes": sum(entry["bytes"] for entry in table), "tensors": table}

    def meet(self, generator: str, workers: int) -> dict[str, Any]:
        """See `WeightSender.meet`. What there was with a generator of that name is forgotten: it is another process."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        with self._lock:
            self._communicators.pop(generator, None)
            self._meetings[generator] = (port, workers + 1)
        return {"master_address": self._address, "master_port": port, "world_size": workers + 1}

    def join(self, generator: str) -> None:
        with self._lock:
            meeting = self._meetings.get(generator)
        if meeting is None:
            raise WeightUpdateError(f"{generator} has not asked the sender of the weights for a meeting")
        communicator = self._connect(self._address, *meeting)
        with self._lock:
            if self._meetings.get(generator) == meeting:  # else it was restarted meanwhile, and asks again
                self._communicators[generator] = communicator

    def send(self, generator: str, version: int) -> None:
        """Raises WeightUpdateError for a version that is no longer held, or a generator that has not joined."""
        with self._lock:
            communicator = self._communicators.get(generator)
            snapshot = self._snapshots.get(version)  # stays alive while it is being sent
            held = ", ".join(map(str, sorted(self._snapshots)))
        if communicator is None:
            raise WeightUpdateError(f"the sender of the weights has not met {generator}")
        if snapshot is None:
            raise WeightUpdateError(
                f"version {version} for {generator} is no longer held by the sender of the weights, which has {held}"
            )
        communicator.broadcast(iter(snapshot))


class _Nccl:
    def __init__(self, group: Any) -> None:
        self._group = group

    def broadcast(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import (
            DEFAULT_PACKED_BUFFER_SIZE_BYTES,
            DEFAULT_PACKED_NUM_BUFFERS,
            packed_nccl_broadcast_producer,
        )

        packed_nccl_broadcast_producer(
            iterator=tensors,
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1].to("cuda", non_blocking=True),  # ZeRO 3 gathers in host memory
            buffer_size_bytes=DEFAULT_PACKED_BUFFER_SIZE_BYTES,
            num_buffers=DEFAULT_PACKED_NUM_BUFFERS,
        )
        torch.cuda.synchronize()


def connect(address: str, port: int, world_size: int) -> Communicator:
    """A communicator over NCCL, on streams of its own."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return _Nccl(trainer_init({"master_address": address, "master_port": port, "world_size": world_size}))


def init_info(meeting: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's `NCCLWeightTransferInitInfo` for one generator: its workers follow the sender, which is rank 0."""
    return {**meeting, "rank_offset": 1, "packed": True}


def update_info(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's `NCCLWeightTransferUpdateInfo` for the tensors of a manifest."""
    tensors = manifest["tensors"]
    return {
        "names": [entry["name"] for entry in tensors],
        "dtype_names": [entry["dtype"] for entry in tensors],
        "shapes": [entry["shape"] for entry in tensors],
    }
