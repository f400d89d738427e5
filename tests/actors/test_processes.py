"""The driver's side of the processes behind the roles, on two nodes of Ray: asked, stopped, killed, ended, and gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.actors import processes
from rlsys.actors.processes import SIGNS, Process, Shell, close, starting, with_output
from rlsys.errors import LearnerError, WorkerDied, WorkerStalled
from rlsys.roles import ProcessReport

pytestmark = pytest.mark.slow

MEMORY = 80 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    head = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Started(NamedTuple):
    actor: Any
    process: Process
    family: list[psutil.Process]  # the actor's process and its child


Start = Callable[..., Awaitable[Started]]


@pytest.fixture
async def start(cluster: Cluster) -> AsyncIterator[Start]:
    """Start an actor with a child, on the head node or on another one."""
    started = []

    class Parent(Shell):  # in here, so that it travels by value
        def __init__(self) -> None:
            self.seen: list[int] = []

        def begin(self) -> tuple[int, int]:
            print("one of many lines", flush=True)
            print("the child is called", file=sys.stderr, flush=True)
            self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            return os.getpid(), self.child.pid

        def note(self, number: int) -> None:
            self.seen.append(number)

        def notes(self) -> list[int]:
            return self.seen

        def hold(self, path: str) -> str:
            def held_here() -> str:
                with open(path) as pipe:  # until somebody writes
                    return pipe.read()

            return held_here()

        def die(self, last_words: str) -> None:
            print(last_words, flush=True)
            os._exit(3)

        def close(self) -> None:
            pass

    async def begin(name: str = "worker-0", node: Any = None) -> Started:
        options: Any = ray.remote
        where = NodeAffinitySchedulingStrategy((node or cluster.head_node).node_id, soft=False)
        remote = options(num_cpus=0, max_restarts=0, concurrency_groups={SIGNS: 1}, scheduling_strategy=where)
        actor = remote(Parent).remote()
        process = Process(name, actor)
        started.append(process)
        await process.locate()
        return Started(actor, process, [psutil.Process(pid) for pid in await actor.begin.remote()])

    yield begin
    await close(started)


def stop(process: psutil.Process) -> None:
    """Returns when it is stopped: nothing tells of it to whoever is not the parent."""
    process.suspend()
    deadline = time.monotonic() + 30
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline


def gone(family: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


async def test_a_process_is_looked_into_in_the_middle_of_a_call(start: Start, tmp_path: Any) -> None:
    actor, process, family = await start()
    os.mkfifo(tmp_path / "pipe")
    held = actor.hold.remote(str(tmp_path / "pipe"))
    await actor.alive.options(concurrency_group=SIGNS).remote()  # while another call is being computed
    pipe = await asyncio.to_thread(os.open, tmp_path / "pipe", os.O_WRONLY)  # when `held_here` has opened it
    stop(family[0])
    report = await process.report()
    family[0].send_signal(signal.SIGCONT)
    os.write(pipe, b"on")
    os.close(pipe)
    assert await held == "on"
    assert (report.worker, report.node, report.pid) == ("worker-0", ray.util.get_node_ip_address(), family[0].pid)
    assert f"(process {family[0].pid}, stopped)" in report.stacks
    assert "held_here (test_processes.py:" in report.stacks
    assert f"sleep 1000 (process {family[1].pid}, sleeping)" in report.stacks
    assert report.output.splitlines() == ["one of many lines", "the child is called"]
    for i in range(200):  # the others still come one at a time, in order
        actor.note.remote(i)
    assert await actor.notes.remote() == list(range(200))


@pytest.mark.parametrize("stopped", [[0], [0, 1]], ids=["actor", "both"])
async def test_closing_leaves_no_process(start: Start, stopped: list[int]) -> None:
    actor, process, family = await start()
    for i in stopped:
        stop(family[i])
    await close([process], [actor.close.remote()])
    assert gone(family)
    await close([process], [actor.close.remote()])  # closing twice does no harm


async def test_a_dead_one_is_reported_on_and_its_stopped_child_is_ended(start: Start) -> None:
    actor, process, family = await start()
    stop(family[1])
    family[0].kill()
    with pytest.raises(ray.exceptions.RayActorError):
        await actor.notes.remote()
    report = await process.report()
    assert report.pid == family[0].pid
    assert f"sleep 1000 (process {family[1].pid}, stopped)" in report.stacks
    assert f"process {family[0].pid}" not in report.stacks
    assert report.output.splitlines()[-1] == "the child is called"
    await close([process], [actor.close.remote()])
    assert gone(family)
    assert (await process.report()).stacks == ""


async def test_whoever_waits_for_the_end_may_be_cancelled(start: Start) -> None:
    actor, process, family = await start()
    stop(family[0])
    closing = asyncio.create_task(close([process], [actor.close.remote()]))
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await processes.end_all()
    assert gone(family)
    assert processes._agents == {}


async def test_an_agent_that_died_is_replaced(start: Start) -> None:
    _, process, _ = await start()
    assert "process" in (await process.report()).stacks
    [agent] = processes._agents.values()
    os.kill(await agent.__ray_call__.remote(lambda _: os.getpid()), signal.SIGKILL)
    assert "process" in (await process.report()).stacks


async def test_a_failed_start_ends_its_processes_and_says_what_they_printed(start: Start) -> None:
    ranks = [await start(f"learner-{i}") for i in range(2)]
    await asyncio.wait([asyncio.ensure_future(ranks[1].actor.die.remote("out of memory"))])
    with pytest.raises(WorkerDied) as died:
        async with starting(*(rank.process for rank in ranks)):
            raise WorkerDied("learner-1", "its process ended")
    assert str(died.value).startswith("learner-1 died: its process ended\nlearner-1's last output:\n")
    assert {"  one of many lines", "  out of memory"} <= set(str(died.value).splitlines())
    assert "learner-0" not in str(died.value)
    assert gone([p for rank in ranks for p in rank.family])


def test_an_error_that_names_no_process_comes_with_the_output_of_all() -> None:
    reports = [ProcessReport(f"learner-{i}", "10.0.0.1", i, "", f"a\nb{i}" if i != 1 else "") for i in range(3)]
    error = with_output(LearnerError("too late"), reports)
    assert type(error) is LearnerError
    assert str(error) == "too late\nlearner-0's last output:\n  a\n  b0\nlearner-2's last output:\n  a\n  b2"
    stalled = with_output(WorkerStalled("learner-2", "silent"), reports)
    assert type(stalled) is WorkerStalled
    assert stalled.cause == "silent\nlearner-2's last output:\n  a\n  b2"


async def test_a_lost_node_is_named(cluster: Cluster, start: Start) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    here, there = await start("here"), await start("there", node)
    assert "sleep 1000" in (await there.process.report()).stacks
    held = processes._agents[node.node_id].__ray_call__.remote(lambda _: time.sleep(1000))
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(ray.exceptions.RayActorError):  # what is left of a node answers for a moment
        await held
    report = await there.process.report()
    assert report.stacks == ""
    assert f"node {report.node} does not answer" in report.output
    await close([there.process], [there.actor.close.remote()])
    assert "sleep 1000" in (await here.process.report()).stacks
    with suppress(psutil.NoSuchProcess):
        there.family[1].kill()  # on a real node that is lost, it is lost as well
