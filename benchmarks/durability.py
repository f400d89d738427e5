"""What ledger, rollout store and checkpoints cost: the same run with them, and without."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil

from benchmarks.common import Ratio, Result
from rlsys.ledger.ledger import Ledger
from rlsys.roles import Handle
from rlsys.sim.drive import drive
from rlsys.sim.roles import MemoryStore
from rlsys.trackers.jsonl import METRICS, read_rows

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STEPS, WARM = 30, 5  # of a run, and how many of them do not count
STEP_S = 0.5  # of the simulated learner, on average
TIMEOUT_S = 400
LOOK_S = 0.1


class UnwrittenLedger(Ledger):
    """Knows the states of prompts, which the driver checks itself with, and writes nothing."""

    def _add(self, statement: str, *values: Any) -> None:
        pass


class NoStore(MemoryStore):
    """Of handles of any kind: nothing is looked at."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    async def buffered(self, group: Handle) -> None:
        pass

    async def settled(self, prompt_ids: Sequence[str], fate: str, step: int, reference: Sequence[Any] = ()) -> None:
        pass

    async def load_buffered(self) -> Mapping[str, Any]:
        return {}

    async def samples(self, step: int, limit: int) -> Sequence[Any]:
        return []


def run(rounds: int) -> Result:
    """Seconds with none of them over seconds with all of them, in pairs: 1 is no cost."""
    rounds = min(rounds, 4)  # a pair of the quickstart takes two and a half minutes
    _quickstart(False), _simulated(True)  # warm up the caches, and import what is needed
    real = _pairs(_quickstart, rounds)
    ratios = {
        "simulated roles, seconds": Ratio.of([(bare.wall, ours.wall) for bare, ours in _pairs(_simulated, rounds)]),
        "quickstart, seconds": Ratio.of([(bare.wall, ours.wall) for bare, ours in real]),
        # What it costs where all cores are busy; a machine that is shared disturbs it less.
        "quickstart, CPU seconds of all processes": Ratio.of([(bare.cpu, ours.cpu) for bare, ours in real]),
    }
    rows = tuple((name, str(ratio), "without them over with") for name, ratio in ratios.items())
    figures = {name: [ratio.median, ratio.low, ratio.high] for name, ratio in ratios.items()}
    return Result("durability", "Cost of ledger, rollout store and checkpoints (every 10 steps)", rows, figures)


class Spent(NamedTuple):
    """Seconds, and CPU seconds of all processes, of the steps that count."""

    wall: float
    cpu: float


def _pairs(spend: Callable[[bool], Spent], rounds: int) -> list[tuple[Spent, Spent]]:
    """Without and with, either first in turn, for a machine whose speed drifts."""
    pairs = []
    for number in range(rounds):
        first = number % 2 == 1
        found = {kept: spend(kept) for kept in (first, not first)}
        pairs.append((found[False], found[True]))
        print(f"  {spend.__name__.strip('_')}: without {found[False]}, with {found[True]}", flush=True)
    return pairs


def _simulated(kept: bool) -> Spent:
    """A run whose learner alone takes time."""
    ledger = Ledger if kept else UnwrittenLedger
    return Spent(drive(20, 64, 8, on_disk=kept, step_s=STEP_S, ledger=ledger).seconds, math.nan)


def _quickstart(kept: bool) -> Spent:
    """In a process of its own."""
    with TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.durability", "with" if kept else "without", directory]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            cpu = _cpu_seconds(psutil.Process(process.pid), Path(directory) / "run" / METRICS)
            if process.wait(TIMEOUT_S):
                raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
        steps = read_rows(Path(directory) / "run" / METRICS)
    return Spent(sum(float(step["time/step_s"]) for step in steps[WARM:]), cpu)


def _cpu_seconds(root: psutil.Process, metrics: Path) -> float:
    """Of a run and all that it has started, a step: between the steps that are warm and the last one but one."""
    seen: list[tuple[int, float]] = []
    deadline = time.monotonic() + TIMEOUT_S
    for wanted in (WARM, STEPS - 1):
        while (steps := len(read_rows(metrics))) < wanted:
            if not root.is_running() or time.monotonic() > deadline:
                raise RuntimeError(f"the run in {metrics.parent} has not come to step {wanted}")
            time.sleep(LOOK_S)
        seen.append((steps, sum(map(_times, [root, *root.children(recursive=True)]))))
    [(first, before), (last, after)] = seen
    return (after - before) / (last - first)


def _times(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _train(mode: str, directory: str) -> None:
    import rlsys.actors.cluster as cluster
    import rlsys.ledger.ledger as ledger
    from rlsys.cli.train import train

    if mode == "without":
        ledger.Ledger = UnwrittenLedger  # type: ignore[misc]
        cluster.RolloutStore = NoStore  # type: ignore[misc, assignment]
    settings = {
        "run.steps": str(STEPS),
        "run.dir": f"{directory}/run",
        "checkpoint.every": "10" if mode == "with" else "0",
        "eval.every": "0",
        "eval.before": "false",
        "eval.after": "false",
    }
    train(QUICKSTART, [text for key, value in settings.items() for text in (f"--{key}", value)])


if __name__ == "__main__":
    _train(*sys.argv[1:])
