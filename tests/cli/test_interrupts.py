"""Ctrl-C: real signals to this process, over a driver on simulated roles."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from rlsys.cli.train import Interrupts
from rlsys.driver.checkpoints import Checkpoints
from rlsys.sim.drive import Simulation, sim_config
from rlsys.trackers.console import ConsoleTracker
from rlsys.trackers.jsonl import JsonlTracker, read_rows

STEPS = 1000


class InterruptAt(JsonlTracker):
    """Sends SIGINT to this process when step 3 is logged, as a terminal would."""

    def log_step(self, step: int, metrics: object) -> None:
        super().log_step(step, {})
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)


class Impatient(ConsoleTracker):
    """Presses Ctrl-C again when told that the run is stopping."""

    def warn(self, text: str) -> None:
        super().warn(text)
        os.kill(os.getpid(), signal.SIGINT)


async def run(directory: Path, kind: type[ConsoleTracker], said: io.StringIO) -> dict[str, object]:
    config = sim_config(
        run={"steps": STEPS},
        rollout={"samples_per_prompt": 2},
        driver={"prompts_per_step": 2},
        eval={"prompts": 1, "before": False, "after": False},
        checkpoint={"every": 0},
    )
    console = kind("run", directory, STEPS, "none", Console(file=said, width=200))
    with Interrupts(console) as interrupts:
        simulation = Simulation(config, directory)
        simulation.driver.tracker = simulation.driver.recorder.tracker = InterruptAt(directory)
        interrupts.driver = simulation.driver
        return await simulation.run()


def test_the_first_ends_with_a_checkpoint(tmp_path: Path) -> None:
    said = io.StringIO()
    summary = asyncio.run(run(tmp_path, ConsoleTracker, said))
    assert summary["steps"] in (3, 4)  # the step that was under way is finished
    newest = Checkpoints(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.manifest.version == summary["steps"]
    assert "Ctrl-C again ends at once" in said.getvalue()
    assert (tmp_path / "summary.json").is_file()


def test_the_second_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run(tmp_path, Impatient, io.StringIO()))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")][:3] == [1, 2, 3]
    assert Checkpoints(tmp_path / "checkpoints").newest() is None


def test_before_the_driver_is_there_one_is_enough(tmp_path: Path) -> None:
    async def start() -> None:
        with Interrupts(ConsoleTracker("run", tmp_path, 1, "none")):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(start())


def test_afterwards_ctrl_c_is_pythons_again() -> None:
    async def start_and_end() -> None:
        with Interrupts(ConsoleTracker("run", Path(), 1, "none")):
            pass

    asyncio.run(start_and_end())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
