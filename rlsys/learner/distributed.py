"""The process group of the learner's ranks: gloo on the CPU profile, NCCL on the GPU profile."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

from rlsys.errors import LearnerError

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore

T = TypeVar("T")
Profile = Literal["cpu", "gpu"]


def open_rendezvous(address: str, timeout_s: float) -> TCPStore:
    """Rank 0's meeting point on a port that the system chooses: read `store.port` and tell the other ranks."""
    from torch.distributed import TCPStore

    return TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join(
    profile: Profile,
    rank: int,
    world_size: int,
    address: str,
    port: int,
    *,
    store: TCPStore | None = None,
    threads: int | None = None,
    timeout_s: float,
) -> torch.device:
    """Make this process rank `rank` of `world_size`, and return the device it computes on.

    Rank 0 passes the `store` that it opened; the others find it at `address` and `port`. `timeout_s` bounds the meeting
    and every collective operation after it. Raises LearnerError when the ranks do not meet.
    """
    # DeepSpeed reads all of these from the environment when it is imported or initialised. Every rank sees its own
    # device only, so its local rank is 0.
    os.environ.update(
        DS_ACCELERATOR="cuda" if profile == "gpu" else "cpu",
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // world_size))
    device = torch.device("cuda", 0) if profile == "gpu" else torch.device("cpu")
    if profile == "gpu":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    try:
        if store is None:
            store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
        dist.init_process_group(
            "nccl" if profile == "gpu" else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise LearnerError(
            f"learner rank {rank} of {world_size} did not meet the others at {address}:{port}: {error}"
        ) from error

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Left to itself, DeepSpeed compiles a shared-memory all-reduce at first use, with gcc and ninja and for a minute.
    # Only its inference engine ever calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return device


def leave() -> None:
    """End the process group, if there is one. A next learner in this process makes its own."""
    import torch.distributed as dist

    if dist.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's leaves DeepSpeed with groups that are no more


def gather_objects(value: T) -> Sequence[T]:
    """Every rank's `value`, in order of rank, on every rank."""
    import torch.distributed as dist

    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]
