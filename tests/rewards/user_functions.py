"""Reward functions such as users write, good and bad; the tests name them as `user_functions.py:function`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

barrier = asyncio.Barrier(5)


def length(response):
    return len(response)


def everything(prompt, response, answer, metadata, token_ids, truncated, task, prompt_id, sample):
    """1 if every argument is what `test_worker.group` puts into sample 0."""
    return float(
        (prompt, response, answer, metadata) == ("1+2=", "3", "3", {"level": 2})
        and (token_ids.tolist(), truncated, task, prompt_id, sample) == ([7, 8], False, "sums", "sums/0@0", 0)
    )


def any_arguments(**given):
    return len(given)


def components(response, scale):
    print("a function may print")
    import numpy as np

    return {"score": scale * len(response), "format": np.float32(0.5)}


async def async_length(response):
    await asyncio.sleep(0)
    return len(response)


class Callable:
    async def __call__(self, response):
        return len(response)


callable_object = Callable()


def as_number(response):
    return {"score": float(response), "half": float(response) / 2}


def hang_on_x(response):
    while response == "x":
        pass
    return 1.0


def tell_and_hang_on_x(response, pipe):
    if response == "x":
        Path(pipe).write_text("here I hang")
        threading.Event().wait()
    return 1.0


def hang_in_c_on_x(response):
    if response == "x":
        ctypes.PyDLL(None).pause()  # keeps the interpreter lock, so that no other thread runs
    return 1.0


def announce_and_lock(response):
    print(os.getpid(), flush=True)
    ctypes.PyDLL(None).pause()


async def never_on_x(response):
    if response == "x":
        await asyncio.Event().wait()
    return 1.0


async def block_on_x(response):
    if response == "x":
        threading.Event().wait()
    return 1.0


async def five_at_once(response):
    await barrier.wait()
    return 1.0


def die_on_x(response):
    if response == "x":
        os._exit(3)
    return 1.0


def crash_on_x(response):
    if response == "x":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def killed_once(response, marker):
    """The first call is killed from outside, so to speak."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def leave_a_process(response, marker):
    """Starts a process that stays, and hangs itself."""
    child = os.fork()
    if child == 0:
        signal.pause()
    Path(marker).write_text(str(child))
    threading.Event().wait()


def raises(response):
    raise ValueError("no such thing")


async def raises_async(response):
    raise KeyError("gone")


def exits(response):
    sys.exit(4)


def returns_text(response):
    return "1.0"


def returns_none(response):
    return None


def returns_nan(response):
    return float("nan")


def returns_infinity(response):
    return {"score": 1.0, "part": float("inf")}


def returns_no_score(response):
    return {"reward": 1.0}


def returns_array(response):
    import numpy as np

    return np.zeros(3)


def needs_more(response, answr):
    return 1.0


def positional(response, /):
    return 1.0
