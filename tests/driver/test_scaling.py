"""Sizes that change while a run goes on, and the socket by which they are asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.models import Sizes
from rlsys.driver.control import SOCKET, ask, controlled
from rlsys.errors import ConfigError, RunDirError
from rlsys.ledger.story import read_run
from rlsys.sim.drive import Simulation, at, sim_config, simulate
from rlsys.sim.roles import SimGenerator, Timing


def scaled(seconds: float, **sizes: int) -> Callable[[Simulation], None]:
    return lambda simulation: at(seconds, lambda: simulation.driver.scale(Sizes(**sizes)))


def test_generators_join_with_the_newest_weights_and_leave_when_their_work_is_done(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        scaled(12.0, generators=3)(simulation)
        at(22.0, lambda: seen.update(status=simulation.driver.status()))
        scaled(23.0, generators=1)(simulation)

    seen: dict[str, Any] = {}
    config = sim_config(steps=12, bound=2, batch=4, generators=1, checkpoint={"every": 0})
    simulation, summary = simulate(config, tmp_path, act, timing=Timing(lengths=(30, 60)))
    assert summary["fates"] == {"trained": 48, "dropped": {}, "pending": 0}
    assert [worker["name"] for worker in seen["status"]["workers"]][:3] == ["generator-0", "generator-1", "generator-2"]
    added = simulation.generators[1:]
    assert sorted(generator.name for generator in added) == ["generator-1", "generator-2"]
    for generator in added:
        assert generator.calls, "they took part"
        assert generator._history[0][1] >= 1, "and did so with the weights of their time"
    notes = [(n.event, n.detail.get("worker")) for n in read_run(tmp_path).notes]
    assert {("worker left", "generator-1"), ("worker left", "generator-2")} <= set(notes)
    assert not any(event == "worker lost" for event, _ in notes)
    assert list(summary["versions"]["generators"]) == ["generator-0"]


def test_a_leaving_generator_that_dies_loses_no_work_and_does_not_come_back(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        scaled(3.0, generators=1)(simulation)
        at(3.1, simulation.generators[1].kill)

    config = sim_config(steps=4, bound=2, generators=2)
    simulation, summary = simulate(config, tmp_path, act, timing=Timing(lengths=(60, 90)))
    assert summary["fates"]["trained"] == 16
    assert simulation.spawns == 0


def test_one_that_is_wanted_again_before_it_is_gone_stays(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        for seconds, count in ((3.0, 1), (3.1, 2)):
            scaled(seconds, generators=count)(simulation)

    simulation, summary = simulate(
        sim_config(steps=4, bound=2, generators=2), tmp_path, act, timing=Timing(lengths=(60, 90))
    )
    assert summary["fates"]["trained"] == 16
    assert len(simulation.generators) == 2
    assert sorted(summary["versions"]["generators"]) == ["generator-0", "generator-1"]


def test_a_learner_of_another_shape_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    config = sim_config(steps=8, bound=0, checkpoint={"every": 0})
    whole, _ = simulate(config, tmp_path / "whole")
    simulation, summary = simulate(config, tmp_path / "parts", scaled(6.0, learner_ranks=2, zero_stage=2))
    first, second = simulation.learners
    assert second.state == whole.learner.state
    assert first.batches + second.batches == whole.learner.batches, "no step is done twice"
    assert summary["fates"]["trained"] == 32
    assert simulation.driver.training.config.learner.ranks == 2


def test_reward_workers_come_and_go(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        scaled(2.0, reward_workers=3)(simulation)
        scaled(9.0, reward_workers=1)(simulation)

    simulation, summary = simulate(sim_config(steps=8, bound=1), tmp_path, act)
    assert sorted(rewarder.name for rewarder in simulation.rewarders) == ["rewarder-0", "rewarder-1", "rewarder-2"]
    assert summary["fates"]["trained"] == 32
    assert simulation.driver.rewarders.size == 1


def test_a_running_driver_is_asked_and_told_over_its_socket(tmp_path: Path) -> None:
    """In a folder whose path is longer than a socket's address may be."""
    run_dir = tmp_path / ("a" * 120)

    class Patient(SimGenerator):
        """Does not answer before the test has asked what it wants to know."""

        async def _sample(self, prompt: Any, sampling: Any) -> Any:
            if not prompt.id.startswith("eval"):
                await asked.wait()
            return await super()._sample(prompt, sampling)

    asked = asyncio.Event()

    async def main() -> tuple[dict[str, Any], list[str], dict[str, Any]]:
        config = sim_config(steps=3, checkpoint={"every": 0})
        simulation = Simulation(config, run_dir)
        for generator in simulation.generators:
            generator.__class__ = Patient
        async with controlled(simulation.driver, run_dir), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(simulation.run())
            while not (status := (await ask(run_dir, {"ask": "status"}))["status"])["groups"]["under_way"]:
                pass  # each question is a turn of the event loop
            said = (await ask(run_dir, {"ask": "scale", "sizes": {"generators": 3}}))["said"]
            for question, message in (
                ({"ask": "scale", "sizes": {"generators": 0}}, "greater than 0"),
                ({"ask": "scale", "sizes": {"gpus": 1}}, "gpus"),
                ({"ask": "dance"}, "status, scale and stop"),
            ):
                with pytest.raises(ConfigError, match=message):
                    await ask(run_dir, question)
            asked.set()
            summary = await running
        return status, said, summary

    status, said, summary = asyncio.run(main())
    assert json.loads(json.dumps(status)) == status
    assert (status["step"], status["steps"], status["started"]) == (0, 3, True)
    assert status["groups"] == {"open_slots": 0, "under_way": 8, "buffered": 0}
    assert sum(w["work"] for w in status["workers"] if w["name"].startswith("generator")) == 8
    assert said == ["generators: 2 -> 3"]
    assert summary["fates"]["trained"] == 12
    assert not (run_dir / SOCKET).exists()
    with pytest.raises(RunDirError, match="no run is going on there"):
        asyncio.run(ask(run_dir, {"ask": "status"}))
