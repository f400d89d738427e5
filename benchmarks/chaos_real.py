"""`python -m benchmarks.chaos_real`: the quickstart, while one of its processes after the other is killed or stopped.

A supervised run is started as a user would. Then, again and again: wait until every role is well, wait for the next
moment on the list (generating, scoring, publishing, ...), and send SIGKILL or SIGSTOP to the next process on the list
(driver, learner rank, reference, generator, its engine, reward worker, its child). In the end the run must have ended
by itself with exit code 0, every prompt must have one fate, and the accuracy must be that of undisturbed runs.

Exit code 0 when all of that holds. Results go into benchmarks/results/chaos_real.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS
from rlsys.driver.control import ask
from rlsys.errors import RlsysError
from rlsys.ledger.story import read_run

CONFIG = Path("configs/quickstart.yaml")
LIMIT_S = 1200.0  # for the whole of it
MOMENT_S = 15.0  # for a moment to come; then the fault strikes all the same
POLL_S = 0.005
SETTINGS = {  # patience that shows within the time there is; and moments that come often
    "--driver.silence_timeout_s": "10",
    "--rollout.stall_timeout_s": "15",
    "--weights.timeout_s": "15",
    "--checkpoint.every": "4",
    "--eval.every": "4",
    "--eval.every_prompts": "64",
}
RESULT, UNDISTURBED = RESULTS / "chaos" / "real.json", RESULTS / "chaos" / "undisturbed.json"

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Role:
    """`find` gives its processes among those of the run; `workers` are what `rlsys status` calls it, where it counts
    their failures."""

    name: str
    find: Callable[[list[psutil.Process]], list[psutil.Process]]
    workers: str


def _actors(title: str) -> Callable[[list[psutil.Process]], list[psutil.Process]]:
    return lambda family: [process for process in family if _line(process).startswith(f"ray::{title}")]


def _children(title: str, word: str) -> Callable[[list[psutil.Process]], list[psutil.Process]]:
    return lambda family: [child for actor in _actors(title)(family) for child in _of(actor) if word in _line(child)]


ROLES = (
    Role("generator", _actors("GeneratorActor"), "generator"),
    Role("learner", _actors("LearnerActor"), "learner"),
    Role("engine", _children("GeneratorActor", "EngineCore"), "generator"),
    Role("reference", _actors("ReferenceActor"), "reference"),
    Role("driver", lambda family: [p for p in family if "rlsys.cli.main" in _line(p)], ""),
    Role("rewarder", _actors("RewardActor"), "rewarder"),
    Role("reward child", _children("RewardActor", "rlsys.rewards.child"), ""),
)


def _going_on(word: str) -> Callable[[Status], bool]:
    return lambda status: any(text.startswith(word) for text in status["doing"])


MOMENTS: dict[str, Callable[[Status], bool]] = {
    "generating": lambda status: any(w["work"] for w in status["workers"] if w["name"].startswith("generator")),
    "stepping": _going_on("step"),
    "scoring": lambda status: any(w["work"] for w in status["workers"] if w["name"].startswith("rewarder")),
    "publishing": _going_on("publish"),
    "checkpointing": lambda status: _going_on("copy")(status) or _going_on("checkpoint")(status),
    "evaluating": _going_on("evaluation"),
    "starting": lambda status: not status["started"] or any(w["state"] == "starting" for w in status["workers"]),
}


@dataclass(slots=True)
class Fault:
    """`found_s`: until the driver knew (None: it never noticed, or was itself hit); `well_s`: until all roles were."""

    role: str
    signal: str
    moment: str  # as it was wanted, or "any" when it did not come
    at_s: float
    step: int
    found_s: float | None = None
    well_s: float | None = None


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def look(run_dir: Path) -> Status | None:
    """The driver's status; None while there is no driver to ask."""
    try:
        return dict(asyncio.run(ask(run_dir, {"ask": "status"}))["status"])
    except (RlsysError, OSError):
        return None


def is_well(status: Status | None) -> bool:
    return status is not None and status["started"] and all(w["state"] == "healthy" for w in status["workers"])


def plan(seed: int) -> Iterator[tuple[Role, int, str]]:
    """Every role and every moment in turn, in an order of their own, so that each meets each in time."""
    rng = random.Random(seed)
    for count in itertools.count():
        moments = list(MOMENTS)
        for i, role in enumerate(ROLES):
            number = signal.SIGSTOP if role.name != "driver" and (i + count) % 3 == 2 else signal.SIGKILL
            yield role, number, moments[(i + count * 2 + rng.randrange(2)) % len(moments)]


class Run:
    """A supervised run in a process of its own."""

    def __init__(self, run_dir: Path, seed: int) -> None:
        self.run_dir = run_dir
        settings = [part for pair in SETTINGS.items() for part in pair]
        command = [str(Path(sys.executable).with_name("rlsys")), "train", str(CONFIG), "--supervise", *settings]
        command += ["--run.dir", str(run_dir), "--run.seed", str(seed), "--trackers.console", "plain"]
        self.output = (run_dir.parent / f"{run_dir.name}.log").open("w")
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT)
        self.started = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic() - self.started

    @property
    def over(self) -> bool:
        return self.process.poll() is not None or self.now > LIMIT_S

    def family(self) -> list[psutil.Process]:
        return _of(psutil.Process(self.process.pid))

    def until(self, condition: Callable[[Status | None], bool], seconds: float) -> Status | None:
        """The first status that fulfils the condition; None when there is none in time, or the run is over."""
        deadline = self.now + seconds
        while not self.over and self.now < deadline:
            status = look(self.run_dir)
            if condition(status):
                return status
            time.sleep(POLL_S)
        return None


def disturb(run: Run, seed: int, count: int, calm_s: float, console: Console) -> list[Fault]:
    """So many faults, or as many as there are until the run is over."""
    faults: list[Fault] = []
    for role, number, moment in plan(seed):
        if len(faults) == count:
            break
        if moment != "starting" and run.until(is_well, LIMIT_S) is None:
            break
        run.until(lambda status: False, calm_s)
        at_moment = MOMENTS[moment]
        if moment == "starting":  # another one, shortly before, has something start
            _strike(run, ROLES[1 if role.name != "learner" else 3], signal.SIGKILL)
        seen = run.until(lambda status, at_moment=at_moment: status is not None and at_moment(status), MOMENT_S)  # type: ignore[misc]
        if run.over:
            break
        struck = _strike(run, role, number)
        if struck is None:
            continue
        status = seen or look(run.run_dir)
        step = status["step"] if status else -1
        fault = Fault(role.name, signal.Signals(number).name, moment if seen else "any", run.now, step)
        faults.append(fault)
        restarts = _restarts(status, role)
        if role.workers:
            found = run.until(lambda s, n=restarts, r=role: s is not None and _restarts(s, r) > n, 90.0)  # type: ignore[misc]
            fault.found_s = run.now - fault.at_s if found else None
        elif role.name == "driver":
            run.until(lambda status: status is None, 10.0)
        else:  # its worker starts another one, and does not count that as a failure
            run.until(lambda status, old=struck.pid, r=role: _is_replaced(run, r, old), 60.0)  # type: ignore[misc]
        if run.until(is_well, 300.0) is not None:
            fault.well_s = run.now - fault.at_s
        console.print(
            f"{fault.at_s:5.0f} s  step {fault.step:3d}  {fault.signal} to the {fault.role} while {fault.moment}: "
            f"found after {_seconds(fault.found_s)}, all well after {_seconds(fault.well_s)}"
        )
    return faults


def _is_replaced(run: Run, role: Role, old: int) -> bool:
    return any(process.pid != old for process in role.find(run.family()))


def _strike(run: Run, role: Role, number: int) -> psutil.Process | None:
    """Send the signal to a process of the role, which is returned; None when there is none at this moment."""
    for process in role.find(run.family()):
        try:
            process.send_signal(number)
        except psutil.Error:
            continue
        return process
    return None


def _restarts(status: Status | None, role: Role) -> int:
    workers = status["workers"] if status else []
    return sum(w["failures"] for w in workers if role.workers and w["name"].startswith(role.workers))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def violations(run_dir: Path, code: int | None, accuracy: float | None, undisturbed: list[float]) -> list[str]:
    """What does not hold of a run that is over."""
    found = []
    if code != 0:
        found.append(f"exit code {code}")
    story = read_run(run_dir)
    steps = [step["step"] for step in story.steps]
    prompts = [step["prompts"] for step in story.steps]
    if steps != list(range(1, 121)) or set(prompts) != {64}:
        found.append(f"steps {steps[:1]} to {steps[-1:]} of {set(prompts)} prompts, expected 1 to 120 of 64")
    if story.fates["pending"] or story.fates["trained"] != 120 * 64:
        found.append(f"fates {story.fates}")
    if accuracy is None or (undisturbed and accuracy < min(undisturbed) - 2 * statistics.stdev(undisturbed)):
        found.append(f"accuracy {accuracy} where undisturbed runs have {undisturbed}")
    if left := [p.pid for p in psutil.process_iter() if str(run_dir) in _line(p)]:
        found.append(f"processes left behind: {left}")
    return found


def accuracy_of(run_dir: Path) -> float | None:
    path = run_dir / "summary.json"
    if not path.is_file():
        return None
    after = json.loads(path.read_text())["eval"]["after"]
    return None if after is None else float(after["accuracy"])


def report(console: Console, faults: list[Fault]) -> None:
    table = Table("process", "faults", "found: median", "worst", "all well: median", "worst", title="Recovery")
    for role in ROLES:
        own = [fault for fault in faults if fault.role == role.name]
        for name in ("SIGKILL", "SIGSTOP"):
            hit = [fault for fault in own if fault.signal == name]
            if hit:
                found = [fault.found_s for fault in hit if fault.found_s is not None]
                well = [fault.well_s for fault in hit if fault.well_s is not None]
                figures = [_seconds(f(v)) if v else "-" for v in (found, well) for f in (statistics.median, max)]
                table.add_row(f"{role.name}, {name}", str(len(hit)), *figures)
    console.print(table)
    moments = {moment: sum(fault.moment == moment for fault in faults) for moment in [*MOMENTS, "any"]}
    console.print("moments: " + ", ".join(f"{moment} {count}" for moment, count in moments.items()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos_real", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--faults", type=int, default=28, metavar="N", help="then it is left in peace (28: each role 4 times)"
    )
    parser.add_argument("--calm", type=float, default=3.0, metavar="S", help="seconds from all well to the next fault")
    parser.add_argument("--undisturbed", type=int, metavar="SEEDS", help="only run so many seeds in peace, to compare")
    parser.add_argument("--keep", action="store_true", help="keep the run directory")
    options = parser.parse_args()
    console = Console(highlight=False)
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    if options.undisturbed:
        accuracies = []
        for seed in range(options.undisturbed):
            run_dir = runs / f"undisturbed-{seed}"
            shutil.rmtree(run_dir, ignore_errors=True)
            run = Run(run_dir, seed)
            run.process.wait(LIMIT_S)
            accuracies.append(accuracy_of(run_dir))
            console.print(f"seed {seed}: {accuracies[-1]} in {run.now:.0f} s")
        UNDISTURBED.write_text(json.dumps({"accuracy": accuracies}) + "\n")
        return 0
    run_dir = runs / f"chaos-{options.seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    run = Run(run_dir, options.seed)
    try:
        faults = disturb(run, options.seed, options.faults, options.calm, console)
        try:
            run.process.wait(max(1.0, LIMIT_S - run.now))
        except subprocess.TimeoutExpired:
            console.print(f"not over after {LIMIT_S:g} s")
    finally:
        if run.process.poll() is None:
            for process in [psutil.Process(run.process.pid), *run.family()]:
                os.kill(process.pid, signal.SIGKILL)
    accuracy = accuracy_of(run_dir)
    undisturbed = json.loads(UNDISTURBED.read_text())["accuracy"] if UNDISTURBED.is_file() else []
    wrong = violations(run_dir, run.process.returncode, accuracy, undisturbed)
    report(console, faults)
    missing = [role.name for role in ROLES if not any(fault.role == role.name for fault in faults)]
    if len(faults) < 20 or missing:
        wrong.append(f"{len(faults)} faults, none of {missing}; 20 and one of each are wanted: try another seed")
    console.print(f"{len(faults)} faults in {run.now:.0f} s; held-out accuracy {accuracy}, undisturbed {undisturbed}")
    result = {"seed": options.seed, "seconds": run.now, "accuracy": accuracy, "violations": wrong}
    RESULT.write_text(json.dumps({**result, "faults": [asdict(f) for f in faults]}, indent=1) + "\n")
    for line in wrong:
        console.print(f"VIOLATED: {line}")
    if not wrong and not options.keep:
        shutil.rmtree(run_dir)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
