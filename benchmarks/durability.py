"""What ledger, rollout store and checkpoints cost: the same run with them, and without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import Ratio, Result
from rlsys.ledger.ledger import Ledger
from rlsys.roles import Handle
from rlsys.sim.drive import drive
from rlsys.sim.roles import MemoryStore

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STEPS, WARM = 30, 5  # of a run, and how many of them do not count
STEP_S = 0.5  # of the simulated learner, on average
TIMEOUT_S = 400


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
    """Steps per second with all of them over steps per second with none, in pairs: 1 is no cost."""
    rounds = min(rounds, 4)  # a pair of the quickstart takes more than two minutes
    _quickstart("without")  # warms up the caches
    pairs = {
        "simulated roles": [(_simulated(False), _simulated(True)) for _ in range(rounds)],
        "quickstart": [(_quickstart("without"), _quickstart("with")) for _ in range(rounds)],
    }
    ratios = {name: Ratio.of(found) for name, found in pairs.items()}
    rows = tuple((name, str(ratio), "throughput with them over without") for name, ratio in ratios.items())
    figures = {name: [ratio.median, ratio.low, ratio.high] for name, ratio in ratios.items()}
    return Result("durability", "Cost of ledger, rollout store and checkpoints (every 10 steps)", rows, figures)


def _simulated(kept: bool) -> float:
    """Seconds of a run whose learner alone takes time."""
    ledger = Ledger if kept else UnwrittenLedger
    return drive(20, 64, 8, on_disk=kept, step_s=STEP_S, ledger=ledger).seconds


def _quickstart(mode: str) -> float:
    """Seconds of the steps that count, in a process of its own."""
    with TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.durability", mode, directory]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
        [metrics] = Path(directory).glob("*/metrics.jsonl")
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return sum(float(step["time/step_s"]) for step in steps[WARM:])


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
