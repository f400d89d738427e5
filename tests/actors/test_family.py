"""The processes of a role, by real ones: found whoever their parent is, looked into when they are stopped, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlsys.actors import family
from rlsys.actors.family import Member

NO_PY_SPY = Path("/bin/false")  # stands for one that may not look into other processes

# One that says where it stands: everything below waits for its standard input to end.
WAITS = "import sys\ndef waiting_here():\n    print('ready', flush=True)\n    sys.stdin.read()\n"
PRINTS_ITS_STACK = "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR1, file=2)\n"

THIS = uuid.uuid4().hex  # so that processes of other runs of these tests are not found

Start = Callable[..., tuple[Member, list[str]]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run a program until its first line of output: "ready" and some words. Standard error goes to `err`."""
    processes = []

    def begin(program: str, **environment: str) -> tuple[Member, list[str]]:
        with (tmp_path / "err").open("a") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env={**os.environ, **environment},
            )
        processes.append(process)
        assert process.stdout is not None
        first, *words = process.stdout.readline().split()
        assert first == "ready"
        return Member.of(psutil.Process(process.pid)), words

    yield begin
    for process in processes:
        assert family.end(family.family(Member.of(psutil.Process(process.pid)), "", ""), timeout_s=20) == []
    for process in processes:
        process.communicate()


def stop(member: Member) -> None:
    os.kill(member.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, member.pid, os.WSTOPPED | os.WNOWAIT)


def test_orphans_are_found_by_their_mark_or_their_session(start: Start) -> None:
    """`marked` has a session of its own, `orphan` no mark, and no parent that leads to it; another family is not it."""
    program = (
        "import subprocess, sys\n"
        "marked = subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
        'middle = \'import subprocess; print(subprocess.Popen(["/bin/sleep", "1000"], stdout=-3, env={}).pid)\'\n'
        "orphan = subprocess.run([sys.executable, '-c', middle], stdout=subprocess.PIPE, text=True).stdout.strip()\n"
        "print('ready', marked.pid, orphan, flush=True)\n"
        "sys.stdin.read()\n"
    )
    root, pids = start(program, MARK=THIS)
    marked, orphan = map(int, pids)
    other, _ = start(WAITS + "waiting_here()", MARK=uuid.uuid4().hex)
    found = family.family(root, "MARK", THIS)
    assert found[0] == root
    assert {member.pid for member in found} == {root.pid, marked, orphan}
    os.kill(orphan, signal.SIGSTOP)
    assert family.end(found[:1], timeout_s=20) == []
    assert {member.pid for member in family.family(root, "MARK", THIS)} == {marked, orphan}
    assert family.end(family.family(root, "MARK", THIS), timeout_s=20) == []
    assert family.family(root, "MARK", THIS) == []
    assert other.process() is not None


def test_a_child_without_the_mark_is_found_by_its_parent(start: Start) -> None:
    root, [child] = start("import os, time\npid = os.fork()\nif pid: print('ready', pid, flush=True)\ntime.sleep(1000)")
    found = family.family(root, "MARK", THIS)
    assert [member.pid for member in found] == [root.pid, int(child)]
    assert family.end(found, timeout_s=20) == []


def test_a_pid_that_was_given_to_another_process_is_left_alone(start: Start) -> None:
    now, _ = start(WAITS + "waiting_here()")
    earlier = Member(now.pid, now.started - 1)
    assert earlier.process() is None
    assert family.end([earlier], timeout_s=20) == []
    assert now.process() is not None


def test_shared_memory_of_a_killed_family_is_taken_away(start: Start) -> None:
    root, [name] = start(
        "from multiprocessing.shared_memory import SharedMemory\nimport sys\n"
        "memory = SharedMemory(create=True, size=4096)\nprint('ready', memory.name, flush=True)\nsys.stdin.read()",
    )
    block = Path("/dev/shm") / name
    assert block.exists()
    assert family.end(family.family(root, "MARK", "none"), timeout_s=20) == []
    assert not block.exists()


def test_stacks_of_a_stopped_process(start: Start) -> None:
    members = [start(WAITS + "waiting_here()")[0] for _ in range(2)]
    stop(members[0])
    found = family.stacks(members, timeout_s=60)
    assert f"(process {members[0].pid}, stopped)" in found
    assert f"(process {members[1].pid}, sleeping)" in found
    assert found.count("    waiting_here (<string>:4)") == 2


def test_where_nobody_may_look_into_a_process_it_prints_its_own_stack(start: Start) -> None:
    (speaks, _), (cannot, _) = start(PRINTS_ITS_STACK + WAITS + "waiting_here()"), start(WAITS + "waiting_here()")
    own = family.stacks([speaks, cannot], 60, NO_PY_SPY)
    assert 'File "<string>", line 6 in waiting_here' in own
    assert "it has not been told to print its own" in family.stacks([cannot], 60, NO_PY_SPY)
    assert cannot.process() is not None, "SIGUSR1 would have ended it"
    stop(speaks)
    assert "a process that is stopped cannot print its own" in family.stacks([speaks], 60, NO_PY_SPY)


def test_the_last_lines_are_those_of_the_file_written_to_last(tmp_path: Path) -> None:
    out, err, missing = tmp_path / "out", tmp_path / "err", tmp_path / "missing"
    err.write_text(":job_id:01000000\n:actor_name:A\n\n" + "".join(f"error {i}\n" for i in range(100)))
    out.write_text("said\n")
    os.utime(err, (1000, 1000))
    assert family.last_lines([err, out, missing]).splitlines() == [*(f"error {i}" for i in range(80, 100)), "said"]
    os.utime(out, (999, 999))
    assert family.last_lines([err, out]).splitlines()[0] == "said"
    out.write_text("x" * 100_000 + "\nend\n")
    assert len(family.last_lines([err, out])) == 4000
    assert family.last_lines([err, out]).endswith("x\nend")
