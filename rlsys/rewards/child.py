"""The child process in which reward functions run.

Plain functions run in the main thread (so that they may use signals), one after the other. Async functions run on an
event loop in a thread of its own, where a slow plain function does not hold them up. A third thread reads what the
parent sends, and ends the process when the parent is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import math
import numbers
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, BinaryIO, cast

from rlsys.errors import RewardSetupError
from rlsys.rewards import LARGEST, RewardFunction, Sample
from rlsys.rewards.calls import Call
from rlsys.rewards.link import pack, read

_PR_SET_PDEATHSIG = 1
_NOT_THE_USERS = (os.path.dirname(__file__), os.path.dirname(importlib.__file__), "<frozen ")


def main(descriptor: int) -> None:
    """Serve the parent at the other end of the socket until it is gone."""
    _die_with_parent()
    os.set_inheritable(descriptor, False)  # what the functions start must not keep the connection open
    connection = socket.socket(fileno=descriptor)
    stream = connection.makefile("rb")
    try:
        functions, timeout_s = read(stream)
    except EOFError:
        return
    except BaseException as error:
        connection.sendall(pack(("failed", f"cannot be loaded: {_last_line(error)}")))
        return
    for label, function in functions:
        try:
            function.prepare()
        except RewardSetupError as error:
            connection.sendall(pack(("failed", f"{label}: {error}")))
            return
        except BaseException as error:  # a module that calls sys.exit() at import is no reason to die without a word
            connection.sendall(pack(("failed", f"{label}: cannot be imported: {_last_line(error)}")))
            return
    server = _Server(connection, functions, timeout_s)
    connection.sendall(pack(("ready", [function.is_async for _, function in functions])))
    server.serve(stream)


class _Server:
    def __init__(
        self, connection: socket.socket, functions: Sequence[tuple[str, RewardFunction]], timeout_s: float
    ) -> None:
        self._connection = connection
        self._functions = [function for _, function in functions]
        self._timeout_s = timeout_s
        self._groups: dict[int, Sequence[Sample]] = {}
        self._plain: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps weak references only

    def serve(self, stream: BinaryIO) -> None:
        if any(function.is_async for function in self._functions):
            threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True).start()
        threading.Thread(target=self._read, args=(stream,), name="parent", daemon=True).start()
        while True:
            self._run_plain(self._plain.get())

    def _read(self, stream: BinaryIO) -> None:
        try:
            while True:
                kind, *content = read(stream)
                if kind == "group":
                    job, samples = content
                    self._groups[job] = samples
                elif kind == "forget":
                    self._groups.pop(content[0], None)
                else:
                    for call in content[0]:
                        if self._functions[call.function].is_async:
                            self._loop.call_soon_threadsafe(self._start_async, call)
                        else:
                            self._plain.put(call)
        except (EOFError, OSError):
            pass
        finally:
            _end_group()

    def _run_plain(self, call: Call) -> None:
        try:
            samples = self._groups.get(call.job)
            if samples is None:
                raise RuntimeError("its group was given up")
            value = self._functions[call.function].score(samples[call.sample])
            answer: tuple[Any, ...] = ("value", call, check_value(value))
        except BaseException as error:  # whatever a reward function raises is recorded with its rollout
            answer = ("error", call, _last_line(error))
        self._send(answer)

    def _start_async(self, call: Call) -> None:
        task = self._loop.create_task(self._run_async(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_async(self, call: Call) -> None:
        deadline = asyncio.timeout(self._timeout_s)
        try:
            samples = self._groups.get(call.job)
            if samples is None:
                raise RuntimeError("its group was given up")
            async with deadline:
                value = await cast("Awaitable[Any]", self._functions[call.function].score(samples[call.sample]))
            answer: tuple[Any, ...] = ("value", call, check_value(value))
        except BaseException as error:
            answer = ("timeout", call, "") if deadline.expired() else ("error", call, _last_line(error))
        self._send(answer)

    def _send(self, answer: tuple[Any, ...]) -> None:
        message = pack((*answer, time.monotonic()))
        try:
            with self._writing:
                self._connection.sendall(message)
        except OSError:
            _end_group()


def check_value(value: object) -> dict[str, float]:
    """The components of what a reward function returned; "score" is among them. Raises ValueError."""
    if isinstance(value, Mapping):
        if "score" not in value:
            raise ValueError(f"returned a dict without 'score' (it has {', '.join(map(repr, value)) or 'nothing'})")
        return {str(name): _number(part, f" as {name!r}") for name, part in value.items()}
    return {"score": _number(value, "")}


def _number(value: Any, where: str) -> float:
    if not isinstance(value, numbers.Real) and hasattr(value, "item"):  # numpy or torch
        with contextlib.suppress(ValueError, RuntimeError):  # more than one element: it stays what it is
            value = value.item()
    if not isinstance(value, numbers.Real):
        raise ValueError(f"returned {_short(value)}{where}, a {type(value).__name__}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}{where}, not a finite number")
    if abs(number) > LARGEST:
        raise ValueError(f"returned {number:g}{where}, which float32 cannot hold")
    return number


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _last_line(error: BaseException) -> str:
    """The last line of the traceback, with the place in the user's code."""
    line = traceback.format_exception_only(error)[-1].strip()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)]
    return f"{line} ({frames[-1].filename}:{frames[-1].lineno})" if frames else line


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent is gone, in case a function holds the interpreter and no thread can run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_group() -> None:
    """End this process and those that reward functions have started: it leads a process group of its own."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
