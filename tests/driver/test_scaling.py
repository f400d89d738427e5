"""Sizes that change while a run goes on, and the socket by which they are asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.models import Config, Sizes
from rlsys.config.sizes import KEYS, SIZES
from rlsys.driver.control import SOCKET, _answer, ask, controlled
from rlsys.errors import ConfigError, PlacementError, RunDirError
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
    assert said == ["rollout.generators: 2 -> 3"]
    assert summary["fates"]["trained"] == 12
    assert not (run_dir / SOCKET).exists()
    with pytest.raises(RunDirError, match="no run is going on there"):
        asyncio.run(ask(run_dir, {"ask": "status"}))


# ---- no room -------------------------------------------------------------------------------------------------------

FULL = PlacementError("the cluster has no room for that:\n  generator: 2 of 9 workers have a place")


def events(run_dir: Path, event: str) -> list[Any]:
    return [note.detail for note in read_run(run_dir).notes if note.event == event]


def test_without_room_the_asker_is_told_and_nothing_changes(tmp_path: Path) -> None:
    asked: list[Any] = []

    def full(config: Config) -> None:
        asked.append((config.rollout.generators, config.rewards.workers, config.learner.ranks))
        raise FULL

    def act(simulation: Simulation) -> None:
        simulation.room = full
        at(3.0, lambda: answers.extend(_answer(simulation.driver, order(sizes)) for sizes in orders))

    orders = [{"generators": 9}, {"reward_workers": 2, "learner_ranks": 2}, {"zero_stage": 2}]
    answers: list[Any] = []
    config = sim_config(steps=6, bound=0)
    whole, _ = simulate(config, tmp_path / "whole")
    simulation, summary = simulate(config, tmp_path / "full", act)
    assert answers == [{"error": str(FULL)}] * 3
    assert asked == [(9, 1, 1), (2, 2, 2), (2, 1, 1)]
    assert simulation.spawns == 0
    assert len(simulation.learners) == 1
    assert simulation.learner.state == whole.learner.state
    assert summary["fates"]["trained"] == 24
    assert not (tmp_path / "full" / SIZES).exists()
    assert not events(tmp_path / "full", "scaled")


def order(sizes: dict[str, int]) -> bytes:
    return json.dumps({"ask": "scale", "sizes": sizes}).encode()


@pytest.mark.parametrize(("role", "kind"), [("generators", "generator"), ("reward_workers", "rewarder")])
def test_a_worker_whose_place_is_taken_meanwhile_is_given_up(
    tmp_path: Path, role: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def act(simulation: Simulation) -> None:
        taken = {f"{kind}-2": [PlacementError("somebody was faster")]}
        simulation.spawn_fails = lambda name: taken[name].pop() if taken.get(name) else None
        scaled(3.0, **{role: 4})(simulation)
        at(7.0, lambda: kept.append(sizes(tmp_path)))
        scaled(8.0, **{role: 4})(simulation)

    kept: list[dict[str, int]] = []
    simulation, summary = simulate(sim_config(steps=12, bound=1), tmp_path, act)
    assert summary["fates"]["trained"] == 48
    key = KEYS[role]
    before = {"generators": 2, "reward_workers": 1}[role]
    assert [kept[0][key], sizes(tmp_path)[key]] == [3, 4]
    assert [note["changes"] for note in events(tmp_path, "scaled")] == [[f"{key}: {before} -> 4"], [f"{key}: 3 -> 4"]]
    assert events(tmp_path, "no room") == [{"worker": f"{kind}-2", "cause": "somebody was faster"}]
    assert any("no room for" in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert simulation.spawns == (4 - before) + 1, "it is not tried again before somebody asks"
    assert not events(tmp_path, "start failed")


@pytest.mark.parametrize("failures", [1, 2])
def test_a_learner_whose_place_is_taken_meanwhile_goes_back_to_its_shape(tmp_path: Path, failures: int) -> None:
    """The second failure: Ray has not freed yet what was given back."""

    def act(simulation: Simulation) -> None:
        taken = [PlacementError("somebody was faster")] * failures
        simulation.spawn_fails = lambda name: taken.pop() if taken and name == "learner" else None
        scaled(3.0, learner_ranks=2, zero_stage=1)(simulation)

    config = sim_config(steps=8, bound=0)
    whole, _ = simulate(config, tmp_path / "whole")
    simulation, summary = simulate(config, tmp_path / "full", act)
    assert simulation.learner.state == whole.learner.state
    assert summary["fates"]["trained"] == 32
    assert simulation.driver.training.config.learner == config.learner
    assert {key: sizes(tmp_path / "full")[key] for key in ("learner.ranks", "learner.zero_stage")} == {
        "learner.ranks": 1,
        "learner.zero_stage": 0,
    }
    assert [note["worker"] for note in events(tmp_path / "full", "no room")] == ["learner"]


def test_what_is_thought_better_of_before_the_next_step_is_not_done(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        at(6.0, lambda: [simulation.driver.scale(Sizes(learner_ranks=ranks)) for ranks in (2, 1)])

    simulation, _ = simulate(sim_config(steps=8, bound=0), tmp_path, act)
    assert len(simulation.learners) == 1


def sizes(run_dir: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((run_dir / SIZES).read_text())["sizes"]
    return found


def test_the_newest_sizes_are_kept_for_a_supervisor(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        scaled(3.0, generators=3)(simulation)
        scaled(6.0, reward_workers=2, learner_ranks=2)(simulation)

    simulate(sim_config(steps=8), tmp_path, act)
    assert sizes(tmp_path) == {
        "rollout.generators": 3,
        "rewards.workers": 2,
        "learner.ranks": 2,
        "learner.zero_stage": 0,
    }


async def test_a_run_that_is_starting_takes_no_sizes(tmp_path: Path) -> None:
    simulation = Simulation(sim_config(steps=1), tmp_path)
    assert "still starting" in _answer(simulation.driver, order({"generators": 3}))["error"]
    await simulation.run()
