"""The processes of a role on this machine: which they are, what they are doing, how they end. Without Ray.

A process that a role starts may outlive it, and then has another parent. It is still known by its process group or its
session, which it has from the role (Ray gives each worker a group of its own), or, when it has a session of its own, by
a mark: a variable of the environment, which every program inherits that is started from there (but not a mere fork,
of which others see the environment that its parent was started with).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

PY_SPY = Path(sys.executable).with_name("py-spy")
LINES = 20  # of one file of output
CHARACTERS = 4000  # of all output
_RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")  # lines that Ray writes for its log monitor
_TRACKER_S = 2.0
_EXEC_S = 1.0
_OWN_STACK_S = 2.0


class Member(NamedTuple):
    """One process. Pids are used again, so a pid alone does not name one. `started` is in clock ticks since the boot:
    unlike `create_time` of psutil it stays what it is when the clock of the machine is set."""

    pid: int
    started: int

    @classmethod
    def this(cls) -> Member:
        return cls.of(psutil.Process())

    @classmethod
    def of(cls, process: psutil.Process) -> Member:
        return cls(process.pid, _started(process.pid))

    def process(self) -> psutil.Process | None:
        """None when it has ended, whether or not somebody has waited for it since."""
        try:
            process = psutil.Process(self.pid)
            # Its first thread may be done while others are not.
            done = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and process.num_threads() <= 1
            alive = _started(self.pid) == self.started and not done
        except psutil.NoSuchProcess:
            return None
        return process if alive else None


def _started(pid: int) -> int:
    """`starttime` of proc_pid_stat(5). Raises `psutil.NoSuchProcess`."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(pid) from error
    return int(stat.rpartition(")")[2].split()[19])  # the name, in brackets, may hold spaces


def family(root: Member, variable: str, mark: str) -> list[Member]:
    """`root`, what descends from it, and what did so before its parents ended: everything in the process group or the
    session that `root` leads or led, or with `variable=mark` in the environment it was started with.

    `root` comes first; what has ended is left out.
    """
    found: dict[Member, None] = {}
    with suppress(psutil.NoSuchProcess):
        if (process := root.process()) is not None:
            found[root] = None
            found |= dict.fromkeys(map(Member.of, process.children(recursive=True)))
    led = not _was_given_away(root)
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):  # gone meanwhile, or another user's
            group = led and root.pid in (os.getpgid(process.pid), os.getsid(process.pid))
            if group or process.environ().get(variable) == mark:
                found[Member.of(process)] = None
    return [member for member in found if member.process() is not None]


def _was_given_away(root: Member) -> bool:
    """Whether another process has the pid by now. That takes a group and a session which are empty as well."""
    try:
        return _started(root.pid) != root.started
    except psutil.NoSuchProcess:
        return False


def end(members: Sequence[Member], timeout_s: float) -> list[Member]:
    """Kill them; returns those that are still there after `timeout_s`, such as one in the middle of a device call.

    Resource trackers of multiprocessing come last: they take away the shared memory that the others leave, and end by
    themselves when those are gone.
    """
    deadline = time.monotonic() + timeout_s
    trackers = {member for member in members if _is_tracker(member)}
    others = [member for member in members if member not in trackers]
    _kill(others)
    _wait(others, deadline)
    _wait(trackers, min(deadline, time.monotonic() + _TRACKER_S))
    _kill(trackers)
    return _wait(members, deadline)


def wait(members: Sequence[Member], timeout_s: float) -> None:
    """Until they have ended; not for those that are stopped, nor after `timeout_s`."""
    with suppress(psutil.NoSuchProcess):
        moving = [m for m in members if (process := m.process()) and process.status() != psutil.STATUS_STOPPED]
        _wait(moving, time.monotonic() + timeout_s)


def _is_tracker(member: Member) -> bool:
    return any("multiprocessing.resource_tracker" in argument for argument in _command(member))


def _command(member: Member) -> list[str]:
    deadline = time.monotonic() + _EXEC_S
    with suppress(psutil.Error):
        while process := member.process():
            # There is none while a program is being started (execve), though the parent goes on already.
            if (command := process.cmdline()) or time.monotonic() > deadline:
                return command
            time.sleep(0.001)
    return []


def _kill(members: Iterable[Member]) -> None:
    for member in members:
        with suppress(psutil.NoSuchProcess):
            if process := member.process():
                process.kill()


def _wait(members: Iterable[Member], deadline: float) -> list[Member]:
    while (alive := [member for member in members if member.process()]) and time.monotonic() < deadline:
        time.sleep(0.02)  # they are no children of this process: nothing tells of their end
    return alive


def stacks(members: Sequence[Member], timeout_s: float, py_spy: Path = PY_SPY) -> str:
    """The Python stacks of all threads of each process, with what state it is in. Takes at most `timeout_s`.

    Where another process may not be looked into, the first of `members` prints its own, if it has been told how
    (`faulthandler.register(signal.SIGUSR1)`) and is not stopped.
    """
    deadline = time.monotonic() + timeout_s
    parts = []
    for i, member in enumerate(m for m in members if not _is_tracker(m)):
        with suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):  # it ended meanwhile
            if process := member.process():
                title = " ".join(process.cmdline()).strip()[:80] or process.name()
                parts.append(f"{title} (process {member.pid}, {process.status()})")
                try:
                    parts.append(_by_py_spy(member.pid, deadline - time.monotonic(), py_spy))
                except _NoStack as reason:
                    own = _by_itself(process, deadline) if i == 0 else ""
                    parts.append(f"  no stack: {reason}\n{own}".rstrip())
    return "\n".join(parts)


class _NoStack(Exception):
    """py-spy does not say; the message is why."""


def _by_py_spy(pid: int, timeout_s: float, py_spy: Path) -> str:
    # Without --nonblocking it stops the process first, and waits for ever for one that is stopped already.
    command = [str(py_spy), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(0.1, timeout_s), errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NoStack(str(error)) from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise _NoStack(said[0] if said else f"py-spy ended with exit code {done.returncode}")
    _, _, threads = done.stdout.partition("\n\n")  # after the command line and the version
    return "\n".join(f"  {line}" for line in threads.strip().splitlines())


def _by_itself(process: psutil.Process, deadline: float) -> str:
    if process.status() == psutil.STATUS_STOPPED:
        return "  and a process that is stopped cannot print its own"
    if not _catches(process.pid, signal.SIGUSR1):  # which would end it
        return "  and it has not been told to print its own"
    files = outputs(process.pid)
    if not files:
        return "  and its standard error is no file"
    begin = files[-1].stat().st_size
    os.kill(process.pid, signal.SIGUSR1)
    seen = begin
    deadline = min(deadline, time.monotonic() + _OWN_STACK_S)
    while time.monotonic() < deadline:
        time.sleep(0.1)  # nothing tells of its end: it is whole when it has begun and no longer grows
        before, seen = seen, files[-1].stat().st_size
        if before == seen > begin:
            break
    with files[-1].open("rb") as file:
        file.seek(begin)
        said = file.read(seen - begin).decode(errors="replace").strip()
    return "\n".join(f"  {line}" for line in said.splitlines()) or "  and it did not print its own"


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "SigCgt":
            return bool(int(value, 16) >> (number - 1) & 1)
    return False


def outputs(pid: int | str = "self") -> list[Path]:
    """The files that standard output and error of a process go to; empty where they are none."""
    links = (Path(f"/proc/{pid}/fd/{number}") for number in (1, 2))
    return list(dict.fromkeys(path for link in links if (path := link.resolve()).is_file()))


def last_lines(files: Sequence[Path]) -> str:
    """The end of what was printed: at most `LINES` lines of each file and `CHARACTERS` characters in all.

    The file that was written to last comes last.
    """
    there = [file for file in files if file.is_file()]
    ends = (_end_of(file) for file in sorted(there, key=lambda file: file.stat().st_mtime_ns))
    return "\n".join(end for end in ends if end)[-CHARACTERS:]


def _end_of(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4 * CHARACTERS))
        lines = stream.read().decode(errors="replace").splitlines()
    said = [line.rstrip() for line in lines if line.strip() and not line.startswith(_RAYS_OWN)]
    return "\n".join(said[-LINES:])
