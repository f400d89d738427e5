"""The processes behind the roles, wherever they run: what they are doing, what they printed, and their end.

A `Process` is the driver's side of one actor. On every node where there are some, a small actor (`NodeAgent`) looks
into them and kills them: from outside, so that it also works on one that hangs, is stopped, or is dead already.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.actors import family
from rlsys.actors.family import Member
from rlsys.errors import ConfigError, DataError, RlsysError, WorkerDied
from rlsys.roles import INSPECT_TIMEOUT_S, ProcessReport

if TYPE_CHECKING:
    from ray.actor import ActorHandle

GRACE_S = 5.0  # for a role to close by itself
RAYS_KILL_S = 1.0  # for Ray to kill an actor; when somebody else is faster, it takes that for an accident and says so
KILL_TIMEOUT_S = 5.0  # for a killed process to be gone
END_TIMEOUT_S = 10.0  # for all that a process has started to be gone; the node's agent may have to be started first
SIGNS = "signs"  # concurrency group of `Shell.alive`, beside what an actor with threads computes
_MARK = "RLSYS_PROCESS"  # see rlsys.actors.family
_STDERR = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs, and the files that its output goes to."""

    member: Member
    node: str  # id
    address: str
    outputs: tuple[Path, ...]


class Shell:
    """What the actors of all roles have in common."""

    def whereabouts(self, mark: str) -> Place:
        """To be called before anything else: what is started later inherits the mark."""
        os.environ[_MARK] = mark
        faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True)  # for `rlsys.actors.family.stacks`
        node = ray.get_runtime_context().get_node_id()
        return Place(Member.this(), node, ray.util.get_node_ip_address(), tuple(family.outputs()))

    def alive(self) -> None:
        """A sign of life."""


class NodeAgent:
    """Looks after the processes of its node. Calls overlap."""

    def report(self, place: Place, mark: str) -> tuple[str, str]:
        """Stacks of the process and of what it has started, and its last output."""
        members = family.family(place.member, _MARK, mark)
        return family.stacks(members, INSPECT_TIMEOUT_S / 2), family.last_lines(place.outputs)

    def members(self, place: Place, mark: str) -> list[Member]:
        return family.family(place.member, _MARK, mark)

    def kill(self, place: Place, mark: str, members: Sequence[Member]) -> list[Member]:
        """Kill these, and what else has the mark by now; returns those that could not be killed in time."""
        family.wait([place.member], RAYS_KILL_S)
        rest = family.end(members, KILL_TIMEOUT_S)
        # One of them may have started another one meanwhile.
        while not rest and (late := family.family(place.member, _MARK, mark)):
            rest = family.end(late, KILL_TIMEOUT_S)
        return rest


_agents: dict[str, ActorHandle[Any]] = {}  # of this process' cluster, by node id
_open: dict[Process, None] = {}  # every process that was not ended yet, in order of its start


def _agent(node: str) -> ActorHandle[Any]:
    if node not in _agents:
        remote: Any = ray.remote(NodeAgent)
        _agents[node] = remote.options(
            num_cpus=0,
            max_restarts=0,
            max_concurrency=64,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote()
    return _agents[node]


class Process:
    """The process of one actor, and what it has started, as the owner of the actor sees it."""

    def __init__(self, worker: str, actor: ActorHandle[Any]) -> None:
        self.worker = worker
        self._actor = actor
        self._mark = uuid.uuid4().hex
        self._place: Place | None = None
        self._ending: asyncio.Task[None] | None = None
        _open[self] = None

    async def locate(self) -> None:
        """Wait until it runs, and ask where. Raises WorkerDied."""
        try:
            self._place = await self._actor.whereabouts.remote(self._mark)
        except RayError as error:
            raise WorkerDied(self.worker, first_line(error)) from error
        _agent(self._place.node)  # started now, so that it is there when it is needed

    async def report(self) -> ProcessReport:
        """What it is doing. Never raises, and takes at most `INSPECT_TIMEOUT_S`."""
        place = self._place
        if place is None:
            return ProcessReport(self.worker, "", 0, "", "(it has not said where it runs)")
        try:
            async with _limit(INSPECT_TIMEOUT_S, place):
                stacks, output = await _ask("report", place, self._mark)
        except _NoAnswer as reason:
            stacks, output = "", f"({reason})"
        return ProcessReport(self.worker, place.address, place.member.pid, stacks, output)

    async def end(self) -> None:
        """Kill it, and all that it has started; returns when they are gone. It may be gone already, or its node.

        Takes at most `END_TIMEOUT_S`, and goes on when whoever waits for it is cancelled.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(), name=f"end of {self.worker}")
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        place = self._place
        try:
            if place is None:
                return
            async with _limit(END_TIMEOUT_S, place):
                # Before the actor is gone: afterwards a child without the mark has nobody to be found by.
                members = await _ask("members", place, self._mark)
                ray.kill(self._actor)  # for Ray to know that it is on purpose
                for member in await _ask("kill", place, self._mark, members):
                    logger.warning("%s: process %d could not be killed", self.worker, member.pid)
        except _NoAnswer as reason:
            logger.warning("%s: whether all its processes have ended is not known: %s", self.worker, reason)
        finally:
            ray.kill(self._actor)
            del _open[self]


class _NoAnswer(Exception):
    """A node does not say; the message names it, and says why."""


@asynccontextmanager
async def _limit(timeout_s: float, place: Place) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        if agent := _agents.pop(place.node, None):  # it may be the one that hangs: the next call has another
            ray.kill(agent)
        raise _NoAnswer(f"node {place.address} does not answer within {timeout_s:g} s") from None


async def _ask(method: str, place: Place, mark: str, *arguments: Any) -> Any:
    """Call an agent, with a new one when the one there was has died."""
    while True:
        known, agent = place.node in _agents, _agent(place.node)
        try:
            return await getattr(agent, method).remote(place, mark, *arguments)
        except RayError as error:
            if _agents.get(place.node) is agent:
                del _agents[place.node]
            if not (known and isinstance(error, RayActorError)):
                raise _NoAnswer(f"node {place.address} does not answer: {first_line(error)}") from error


async def close(processes: Sequence[Process], closing: Sequence[Awaitable[Any]] = ()) -> None:
    """Wait for what has been asked to close by itself, for `GRACE_S`; then end the processes, whatever is left."""
    tasks = [asyncio.ensure_future(_over(answer)) for answer in closing]
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=GRACE_S)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*(process.end() for process in processes))


async def _over(answer: Awaitable[Any]) -> None:
    try:
        await answer
    except RayActorError:
        pass  # it is gone already
    except RayError as error:
        logger.warning("a worker did not close as it should: %s", first_line(error))


async def end_all() -> None:
    """End what was started by this process and not ended yet, and the agents: the last thing before Ray is left."""
    await close(list(_open))
    for agent in _agents.values():
        ray.kill(agent)
    _agents.clear()


@asynccontextmanager
async def starting(*processes: Process) -> AsyncIterator[None]:
    """Around the start of a role: when it fails, its processes are ended, and the error says what they printed last."""
    try:
        yield
    except BaseException as error:
        try:
            if not isinstance(error, RlsysError) or isinstance(error, ConfigError | DataError):
                raise
            reports = await asyncio.gather(*(process.report() for process in processes))
            for report in reports:
                if report.stacks:
                    logger.info("%s, when its start failed:\n%s", report.worker, report.stacks)
            raise with_output(error, reports) from error.__cause__
        finally:
            await close(processes)


def with_output(error: RlsysError, reports: Sequence[ProcessReport]) -> RlsysError:
    """The same error, and what its process printed last (all of them, where it names none)."""
    if isinstance(error, WorkerDied):
        reports = [report for report in reports if report.worker == error.worker]
    said = "".join(
        f"\n{report.worker}'s last output:\n{indent(report.output, '  ')}" for report in reports if report.output
    )
    if isinstance(error, WorkerDied):
        return type(error)(error.worker, error.cause + said)
    return type(error)(f"{error}{said}")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
