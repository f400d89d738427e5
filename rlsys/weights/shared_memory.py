"""Hand a block of bytes to another process of this machine, and leave nothing behind whatever dies.

The memory is anonymous (`memfd_create`), found by the other side through `/proc/PID/fd/N`: it has no name in /dev/shm
that could outlive a killed process; the kernel frees it with the last process that holds it. Linux only, as is vLLM.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def shared(payload: np.ndarray, name: str) -> Iterator[str]:
    """Copy `payload` (uint8 [bytes], not empty) into shared memory; yield the path at which others can open it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, payload.nbytes)
        np.frombuffer(mmap.mmap(descriptor, payload.nbytes), dtype=np.uint8)[:] = payload
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def attach(path: str) -> np.ndarray:
    """What `shared` made, mapped: uint8 [bytes], read-only; unmapped when the array is freed.

    Raises FileNotFoundError when the process that shared it has closed it or is gone.
    """
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
