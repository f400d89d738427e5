"""`rlsys train --supervise`: a parent that starts the driver again when it dies.

It knows nothing of the run but exit codes and how far the run has got; what to go on from is the driver's business.
Neither Ray nor torch is loaded here, so there is little that could end this process.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from textwrap import indent
from typing import IO, NamedTuple

import psutil
import typer

from rlsys.actors import family
from rlsys.cli.rundir import CONFIG, SUPERVISE_LOG
from rlsys.config.loading import load_config
from rlsys.config.sizes import SUPERVISOR, kept_sizes
from rlsys.trackers.jsonl import METRICS

INTERRUPTED = 130  # exit code, as shells have it
# Exit codes that another start does not change: done, for the user to mend (no room, too), ended on purpose
FINAL = (0, 2, INTERRUPTED)
LAST_LINES = 20
END_TIMEOUT_S = 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


def supervise(path: Path, overrides: Sequence[str]) -> None:
    """Train; start the driver again when it dies, `driver.restarts` times in a row without progress.

    Ends with the driver's exit code. What happens is in RUN/supervise.log as well.
    """
    config = load_config(path, overrides)
    # Without -P the working directory would come first on the module path, as it does not for `rlsys` itself.
    command = [sys.executable, "-P", "-m", "rlsys.cli.main", "train", str(path), *overrides]
    run_dir = Path(config.run.dir)
    restarts = Restarts(config.driver.restarts, reached(run_dir))
    raise typer.Exit(Supervisor(command, [*command, "--run.resume", "auto"], run_dir, restarts).run())


class Reached(NamedTuple):
    """How far a run has got: its newest step in the metrics, and that of its newest checkpoint; 0: none."""

    step: int
    checkpoint: int


def reached(run_dir: Path) -> Reached:
    metrics = run_dir / METRICS
    steps = re.findall(rb'^\{"step": (\d+).*\n', metrics.read_bytes(), re.MULTILINE) if metrics.is_file() else []
    checkpoints = [path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*")]
    return Reached(max(map(int, steps), default=0), max((int(n) for n in checkpoints if n.isdecimal()), default=0))


class Restarts:
    """Whether, and after how long, a driver that died is started again. Pure.

    Progress is what no driver before has reached, so that one which always dies at the same step is given up.
    """

    def __init__(self, limit: int, start: Reached, pause_s: float = 1.0, longest_s: float = 60.0) -> None:
        """At most `limit` starts in a row without progress; `pause_s` before the first, each time twice as long."""
        self.limit = limit
        self.total = 0
        self.in_row = 0  # since there was progress
        self._best = start
        self._pause_s, self._longest_s = pause_s, longest_s

    def died(self, now: Reached) -> float | None:
        """Seconds to wait before the next start; None: no more."""
        best = Reached(*map(max, now, self._best))
        if best != self._best:
            self.in_row = 0
        self._best = best
        if self.in_row >= self.limit:
            return None
        self.in_row += 1
        self.total += 1
        return min(self._longest_s, self._pause_s * 2.0 ** min(self.in_row - 1, 30))


class Supervisor:
    """Runs `first`, and `again` after each death, with the sizes that the run had then.

    To be used in the main thread: it takes signals.
    """

    def __init__(self, first: Sequence[str], again: Sequence[str], run_dir: Path, restarts: Restarts) -> None:
        self._first, self._again = first, again
        self._run_dir = run_dir
        self._restarts = restarts
        self._mark = uuid.uuid4().hex
        self._child: subprocess.Popen[bytes] | None = None
        self._interrupts = 0

    def run(self) -> int:
        """Until a driver ends for good; returns the exit code.

        SIGINT and SIGTERM are passed on: the first has the driver end with a checkpoint, the second at once, and the
        third kills it.
        """
        before = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        try:
            command = self._first
            while True:
                code, said = self._drive(command)
                if code in FINAL or self._interrupts:
                    return _shell_code(code)
                now = reached(self._run_dir)
                pause_s = self._restarts.died(now)
                what = f"the driver {_how(code)} at step {now.step}"
                counts = f"{self._restarts.in_row} in a row without progress, {self._restarts.total} in all"
                if pause_s is None:
                    end = f"; its last lines on standard error:\n{indent(said, '  ')}" if said else ""
                    self._say(f"{what}; it is given up after {self._restarts.total} restarts ({counts}){end}")
                    return _shell_code(code)
                self._say(
                    f"{what}; restart {self._restarts.in_row} of {self._restarts.limit} ({counts}) in {pause_s:g} s"
                )
                if self._interrupted_within(pause_s):
                    return INTERRUPTED
                command = [*self._again, *kept_sizes(self._run_dir, self._mark)]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drive(self, command: Sequence[str]) -> tuple[int, str]:
        """Run one driver to its end, and end what it leaves behind; returns its exit code and its last lines."""
        # In a session of its own: Ctrl-C is to reach it once, through this process.
        self._child = child = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            env={**os.environ, SUPERVISOR: self._mark},
            start_new_session=True,
            preexec_fn=_dies_with(os.getpid()),
        )
        root = family.Member.of(psutil.Process(child.pid))
        if self._interrupts:  # before there was anybody to pass it on to
            child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        lines: deque[bytes] = deque(maxlen=LAST_LINES)
        reader = threading.Thread(target=_copy, args=(child.stderr, lines), daemon=True)
        reader.start()
        code = child.wait()
        self._child = None
        left = family.end(family.family(root, SUPERVISOR, self._mark), END_TIMEOUT_S)
        if left:
            self._say(f"processes that the driver left behind cannot be killed: {', '.join(str(m.pid) for m in left)}")
        reader.join(END_TIMEOUT_S)  # its pipe is closed, now that all who could write into it are gone
        return code, b"".join(lines).decode(errors="replace").rstrip()

    def _pass_on(self, number: int, _: object) -> None:
        self._interrupts += 1
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL if self._interrupts > 2 else number)

    def _interrupted_within(self, seconds: float) -> bool:
        """Wait; True as soon as there is a signal."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # so that none comes between looking and waiting
        try:
            return self._interrupts > 0 or signal.sigtimedwait(_SIGNALS, seconds) is not None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _say(self, text: str) -> None:
        print(f"rlsys: supervise: {text}", file=sys.stderr, flush=True)
        if (self._run_dir / CONFIG).is_file():  # else it is no run directory yet, and a file would keep it from it
            with (self._run_dir / SUPERVISE_LOG).open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")


def _dies_with(parent: int) -> Callable[[], None]:
    """For the child, before it becomes the driver: Linux is to kill it when its parent is gone, however that ended."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone sooner
            os._exit(1)

    return ask


def _copy(pipe: IO[bytes], lines: deque[bytes]) -> None:
    """Pass on what the driver prints on standard error, and keep the last of it."""
    for line in pipe:
        lines.append(line)
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code
