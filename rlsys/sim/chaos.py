"""Everything goes wrong, on simulated roles in virtual time: `python -m rlsys.sim.chaos`.

A seed gives a schedule (`schedules`): a small run of one kind or another, the processes that it takes, and what goes
wrong in each and between them. Each run has to come to its end, with every invariant (`invariants`) kept. A schedule is
run the same way every time: the seed repeats it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsys.sim.clock import VirtualLoop
from rlsys.sim.drive import DAY_S, Simulation, VirtualLedger
from rlsys.sim.faults import Damage, Faults, Fired, hurt
from rlsys.sim.invariants import OF_A_PROCESS, OF_THE_RUN, WHILE_RUNNING, Process, read_evidence
from rlsys.sim.schedules import Life, Schedule, schedule

ENDINGS = ("kill", "stop", "interrupt")  # faults that end the driver
MORE_LIVES = 3  # processes after an error that a schedule has brought about


@dataclass(slots=True)
class Outcome:
    """One schedule: what did not hold (nothing, in a sound run), and what was met."""

    schedule: Schedule
    violations: list[str]
    fired: list[Fired]
    damaged: list[Damage]
    processes: int
    virtual_s: float


def run_schedule(seed: int) -> Outcome:
    """Run the schedule of a seed to its end, or to the first process that breaks an invariant."""
    plan = schedule(seed)
    with tempfile.TemporaryDirectory(prefix="rlsys-chaos-") as directory:
        return _run(plan, Path(directory))


def _run(plan: Schedule, directory: Path) -> Outcome:
    run_dir = directory / "run"
    processes: list[Process] = []
    violations: list[str] = []
    damaged: list[Damage] = []
    lives = list(plan.lives)
    while lives and not violations:
        life = lives.pop(0)
        process = live(plan, life, run_dir, len(processes))
        processes.append(process)
        violations += [f"process {len(processes) - 1}: {text}" for text in process.violations]
        damaged += [damage for damage in life.damage if hurt(damage, run_dir)]
        if not lives and process.end != "done" and len(processes) < len(plan.lives) + MORE_LIVES:
            lives.append(Life(life.config))  # as a supervisor does
    if not violations:
        twin = None
        if plan.lives[0].config.driver.max_staleness == 0:
            undisturbed = replace(plan, disk_s=0.0)
            twin = live(undisturbed, Life(processes[-1].life.config), directory / "twin", 0)
            violations += [f"undisturbed: {text}" for text in twin.violations]
        evidence = read_evidence(plan, run_dir, processes, twin)
        violations += _asked(OF_THE_RUN, evidence)
    for before, after in pairwise(processes):
        _resumed(before, after)
    fired = [fired for process in processes for fired in process.faults.fired]
    return Outcome(plan, violations, fired, damaged, len(processes), sum(p.seconds for p in processes))


def live(plan: Schedule, life: Life, run_dir: Path, number: int) -> Process:
    """One process of the run, from its start to whatever ends it."""
    disk = random.Random(f"disk/{plan.seed}/{number}")
    faults = Faults(life.faults)
    made: list[Process] = []
    moved = (0, 0.0)  # the newest sign that something has happened, and when

    def work_s() -> float:
        faults.work()
        times = 10.0 if disk.random() < 0.2 else 1.0  # as disks do
        return 0.0 if not plan.disk_s else 1e-4 + times * disk.expovariate(1 / plan.disk_s)

    def quiet() -> None:
        nonlocal moved
        if not made or made[0].end or made[0].violations or made[0].simulation.killed:
            return
        process, driver, now = made[0], made[0].simulation.driver, loop.time()
        faults.quiet()
        signs = faults.calls + process.simulation.ledger.position + process.simulation.spawns
        if signs != moved[0]:
            moved = signs, now
        process.longest_still_s = max(process.longest_still_s, now - moved[1])
        if broken := _asked(WHILE_RUNNING, driver):
            process.violations += [f"{text}, {now:.3f} s after its start" for text in broken]
            driver.stop()
            driver.stop()

    loop = VirtualLoop(work_s, quiet)

    async def main() -> None:
        parts: dict[str, Any] = {**plan.parts(), "ledger": VirtualLedger, "ready": False, "spawned": faults.spawned}
        simulation = Simulation(life.config, run_dir, seed=1000 * number, **parts)
        process = Process(plan, life, faults, simulation)
        made.append(process)
        loop.set_exception_handler(lambda _, context: _unheard(process, context))
        faults.arm(simulation)
        try:
            async with asyncio.timeout(DAY_S):
                await simulation.run()
            done = simulation.driver.step >= life.config.run.steps
            process.end = "done" if done else "stopped"
        except asyncio.CancelledError:
            process.end = "killed" if simulation.killed else "interrupted"
        except Exception as error:  # whatever it is: `it_ends_as_it_should` judges it
            process.end, process.error = f"{type(error).__name__}: {error}", error
        process.seconds = loop.time()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())
    gc.collect()  # so that what nobody has asked for is said
    process = made[0]
    resumes, batches = process.simulation.tracker.resumes, any(x.batches for x in process.simulation.learners)
    process.first = resumes[-1] if resumes else 0 if batches else None
    process.violations += _asked(OF_A_PROCESS, process)
    return process


def _asked(invariants: Sequence[Callable[[Any], list[str]]], subject: Any) -> list[str]:
    return [f"{invariant.__name__}: {text}" for invariant in invariants for text in invariant(subject)]


def _unheard(process: Process, context: dict[str, Any]) -> None:
    """Exceptions that nobody has asked for: those of the driver's tasks, and of futures; not of the simulated roles."""
    task = context.get("task") or context.get("future")
    if isinstance(task, asyncio.Task) and "driver" not in Path(task.get_coro().cr_code.co_filename).parts:  # type: ignore[union-attr]
        return
    process.unheard.append(f"{context['message']}: {context.get('exception')!r} of {task!r}")


def _resumed(before: Process, after: Process) -> None:
    """A driver that ended is back with the first step of the next process."""
    steps = [end for name, _, end, lane in after.simulation.tracker.events if lane == "learner" and name[:5] == "step "]
    for fired in before.faults.fired:
        if fired.fault.kind in ENDINGS and steps:
            fired.recovered = steps[0]


def table(outcomes: Sequence[Outcome]) -> Table:
    """Faults by kind and role: how many were met, after how many the work went on, and after what virtual time."""
    met: dict[tuple[str, str], list[Fired]] = defaultdict(list)
    for fired in (fired for outcome in outcomes for fired in outcome.fired):
        kind = fired.fault.kind
        role = "driver" if kind in ENDINGS else "checkpoint" if kind == "damage" else fired.fault.role
        met[kind, role].append(fired)
    out = Table("fault", "of", "met", "went on", "median s", "worst s")
    for (what, of), all_of_them in sorted(met.items()):
        times = sorted(fired.recovered for fired in all_of_them if fired.recovered is not None)
        figures = (f"{statistics.median(times):.1f}", f"{times[-1]:.1f}") if times else ("", "")
        out.add_row(what, of, str(len(all_of_them)), str(len(times)), *figures)
    for damage, count in sorted(Counter(str(d) for outcome in outcomes for d in outcome.damaged).items()):
        what, _, of = damage.partition(": ")
        out.add_row(what, of, str(count), "", "", "")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlsys.sim.chaos", description="Seeded fault schedules on the sim.")
    parser.add_argument("--schedules", type=int, default=500, metavar="N", help="how many (default: 500)")
    parser.add_argument("--start", type=int, default=0, metavar="K", help="the first seed (default: 0)")
    parser.add_argument("--seed", type=int, metavar="K", help="only this one, with its schedule and its log")
    asked = parser.parse_args(arguments)
    console = Console()
    seeds = range(asked.start, asked.start + asked.schedules) if asked.seed is None else [asked.seed]
    logging.basicConfig(level=logging.INFO if asked.seed is not None else logging.CRITICAL, format="%(message)s")
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    for seed in seeds:
        if asked.seed is not None:
            console.print(str(schedule(seed)), markup=False)
        outcome = run_schedule(seed)
        outcomes.append(outcome)
        if outcome.violations:
            console.print(f"seed {seed} fails:\n{outcome.schedule}", markup=False)
            for text in outcome.violations:
                console.print(f"  {text}", markup=False)
            console.print(f"to repeat it: python -m rlsys.sim.chaos --seed {seed}", markup=False)
            return 1
    console.print(table(outcomes))
    processes, met = sum(o.processes for o in outcomes), sum(len(o.fired) + len(o.damaged) for o in outcomes)
    console.print(
        f"{len(outcomes)} schedules of {processes} processes with {met} faults: every run came to its end and kept "
        f"every invariant; {sum(o.virtual_s for o in outcomes) / 3600:.1f} h of virtual time in "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
