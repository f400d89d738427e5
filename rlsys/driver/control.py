"""Questions and orders to a running driver, over a socket in its run directory: one line of JSON there, one back.

    {"ask": "status"}                                           -> {"status": {...}}
    {"ask": "scale", "sizes": {"generators": 3}}                -> {"said": ["rollout.generators: 2 -> 3"]}
    {"ask": "stop"}                                             -> {"said": ["it stops after this step, ..."]}
    anything that does not work                                 -> {"error": "what is wrong"}

Whoever may write to the run directory may give orders.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rlsys.config.models import Sizes
from rlsys.driver.waiting import within
from rlsys.errors import ClusterError, ConfigError, RlsysError, RunDirError, UserError

logger = logging.getLogger(__name__)

SOCKET = "control.sock"
ANSWER_TIMEOUT_S = 10.0


class Controlled(Protocol):
    """The driver, as it is seen from here."""

    def status(self) -> Mapping[str, Any]: ...

    def scale(self, sizes: Sizes) -> list[str]:
        """Begin to change the sizes; says what is changed. Raises ConfigError or PlacementError for what cannot be."""
        ...

    def stop(self) -> None:
        """End after this step, with a checkpoint."""
        ...


@asynccontextmanager
async def controlled(driver: Controlled, run_dir: Path) -> AsyncIterator[None]:
    """Answer for as long as the block lasts. Where the run directory can hold no socket, nobody can ask: a warning."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    writer.write(json.dumps(_answer(driver, await reader.readline())).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()

    with _short(run_dir) as path:
        _remove(path)  # of a process that was killed: the run directory is locked by this one
        try:
            server = await asyncio.start_unix_server(answer, path)
        except OSError as error:
            logger.warning("`rlsys status` and `rlsys scale` will not work: %s: %s", run_dir / SOCKET, error)
            yield
            return
        try:
            async with server:
                yield
        finally:
            _remove(path)


async def ask(run_dir: Path, question: Mapping[str, Any]) -> dict[str, Any]:
    """The driver's answer. Raises RunDirError when none is running there, ConfigError for an order it refuses."""
    late = RlsysError(f"{run_dir}: the driver does not answer within {ANSWER_TIMEOUT_S:g} s; it may hang")
    with _short(run_dir) as path:
        try:
            reader, writer = await within(ANSWER_TIMEOUT_S, asyncio.open_unix_connection(path), late)
        except (FileNotFoundError, ConnectionRefusedError):
            raise RunDirError(f"{run_dir}: no run is going on there (on this machine)") from None
        try:
            writer.write(json.dumps(question).encode() + b"\n")
            line = await within(ANSWER_TIMEOUT_S, reader.readline(), late)
        finally:
            writer.close()
    if not line:
        raise RunDirError(f"{run_dir}: the driver ended before it answered")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer


def _answer(driver: Controlled, line: bytes) -> dict[str, Any]:
    try:
        match json.loads(line):
            case {"ask": "status"}:
                return {"status": driver.status()}
            case {"ask": "scale", "sizes": sizes}:
                return {"said": driver.scale(Sizes.model_validate(sizes))}
            case {"ask": "stop"}:
                driver.stop()
                return {"said": ["it stops after this step, with a checkpoint; the same command goes on from there"]}
    except (ValueError, UserError, ClusterError) as error:  # JSON's and pydantic's are ValueErrors
        return {"error": str(error)}
    return {"error": "it understands status, scale and stop"}


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def _short(run_dir: Path) -> Iterator[str]:
    """A path of the socket that is short enough: a socket's address holds no more than 107 bytes."""
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET}"
    finally:
        os.close(directory)
