"""Workers that die, stall, refuse and fail, on simulated roles in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import BadRollout, EngineError, RewardError, RlsysError, WorkerDied
from rlsys.ledger.story import read_run, read_story
from rlsys.sim.drive import Simulation, at, sim_config, simulate
from rlsys.sim.roles import SimGenerator, SimRewarder, Timing
from rlsys.types import GroupInfo


def test_dead_generators_are_restarted_and_their_work_goes_elsewhere(tmp_path: Path) -> None:
    timing = Timing(lengths=(40, 60))

    def act(simulation: Simulation) -> None:
        first = simulation.generators[0]
        at(3.0, lambda: first.kill("SIGKILL"))

    simulation, summary = simulate(sim_config(steps=3, eval={"before": False}), tmp_path, act, timing=timing)
    assert summary["fates"] == {"trained": 12, "dropped": {}, "pending": 0}
    assert simulation.spawns == 1
    assert [g.name for g in simulation.generators] == ["generator-0", "generator-1", "generator-0"]
    events = [e for i in range(8) for e in read_story(tmp_path, f"sim/{i}").events]
    failed = [e.detail for e in events if e.event == "failed"]
    assert failed
    assert all(detail["worker"] == "generator-0" and "SIGKILL" in detail["cause"] for detail in failed)
    notes = [note.event for note in read_run(tmp_path).notes if note.detail.get("worker") == "generator-0"]
    assert notes == ["worker joined", "worker lost", "processes of a lost worker", "worker restarted"]


def test_a_stalled_generator_loses_its_work_but_a_slow_one_does_not(tmp_path: Path) -> None:
    slow = Timing(lengths=(300, 400), tokens_per_s=1.0)  # 5 minutes a rollout, with a patience of 20 s
    simulation, _ = simulate(sim_config(steps=1, bound=0, eval={"before": False}), tmp_path / "slow", timing=slow)
    assert simulation.spawns == 0
    simulation, _ = simulate(
        sim_config(steps=2, bound=0, eval={"before": False}),
        tmp_path / "stalled",
        lambda s: at(1.0, s.generators[0].stall),
    )
    assert simulation.spawns == 1
    [lost] = [note for note in read_run(tmp_path / "stalled").notes if note.event == "worker lost"]
    assert "no progress for 20 s" in lost.detail["cause"]


def test_giving_up_names_the_worker(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        simulation.spawn_fails = lambda name: EngineError("no memory left")
        at(2.0, lambda: [g.kill() for g in simulation.generators])

    message = "^generator-0 failed 4 times in a row, and no other generator is healthy: no memory left$"
    with pytest.raises(EngineError, match=message):
        simulate(sim_config(generators=1), tmp_path, act)


def test_a_prompt_that_always_fails_is_dropped_with_its_reason(tmp_path: Path) -> None:
    class Cursed(SimGenerator):
        async def _sample(self, prompt: Any, sampling: Any) -> Any:
            if prompt.id == "sim/1":
                raise EngineError("cannot tokenise")
            return await super()._sample(prompt, sampling)

    def act(simulation: Simulation) -> None:
        for generator in simulation.generators:
            generator.__class__ = Cursed

    _, summary = simulate(sim_config(steps=2, rollout={"attempts": 2}), tmp_path, act)
    assert summary["fates"] == {"trained": 8, "dropped": {"generation failed": 1}, "pending": 0}
    story = read_story(tmp_path, "sim/1")
    assert story.prompt["reason"] == "generation failed: 2 attempts, the last: cannot tokenise"
    assert story.prompt["attempts"] == 2


def test_failed_rewards_drop_the_group_when_nothing_is_scored(
    tmp_path: Path, check_fates: Callable[[Path], Any]
) -> None:
    _, summary = simulate(sim_config(steps=3, samples=1), tmp_path, timeout_rate=0.3)
    assert summary["fates"]["dropped"]["rewards failed"] > 0
    assert summary["fates"]["trained"] == 12
    check_fates(tmp_path)


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    class DropAll:
        def drop_reason(self, info: GroupInfo) -> str | None:
            return "zero variance"

    message = "100 groups in a row were dropped since step 0, the last for 'zero variance'"
    with pytest.raises(RlsysError, match=message):
        simulate(sim_config(batch=1), tmp_path, filters=[DropAll()])


@pytest.mark.parametrize("seen_by", ["generator", "rewarder"])
def test_what_a_generator_made_up_is_sampled_again_and_counted(tmp_path: Path, seen_by: str) -> None:
    refusals = []

    def refuse(prompt_id: str) -> None:
        if prompt_id in ("sim/2", "sim/3") and refusals.count(prompt_id) < (1 if prompt_id == "sim/2" else 2):
            refusals.append(prompt_id)
            raise BadRollout(
                f"generator-0: prompt {prompt_id}, sample 1: inf", kind="log-probs", generator="generator-0"
            )

    class Checking(SimGenerator):
        async def _sample(self, prompt: Any, sampling: Any) -> Any:
            generated = await super()._sample(prompt, sampling)
            refuse(prompt.id)
            return generated

    class Strict(SimRewarder):
        async def score(self, rounds: Any, training: bool) -> Any:
            refuse(rounds[0][0].prompt.id)
            return await super().score(rounds, training)

    def act(simulation: Simulation) -> None:
        for worker in simulation.generators if seen_by == "generator" else simulation.rewarders:
            worker.__class__ = Checking if seen_by == "generator" else Strict

    simulation, summary = simulate(sim_config(steps=3, rollout={"attempts": 2}), tmp_path, act)
    assert summary["fates"] == {"trained": 12, "dropped": {"generation failed": 1}, "pending": 0}
    assert sum(metrics.get("refused/log-probs", 0) for _, metrics in simulation.tracker.steps) == 3
    story = read_story(tmp_path, "sim/3")
    assert story.prompt["reason"] == "generation failed: 2 attempts, the last: generator-0: prompt sim/3, sample 1: inf"
    failed = [event.detail["worker"] for event in story.events if event.event == "failed"]
    assert all(worker.startswith("generator") for worker in failed)
    assert simulation.spawns == 0


def test_a_generator_that_fails_an_update_is_restarted(tmp_path: Path) -> None:
    class Refuses(SimGenerator):
        async def update(self, weights: Any) -> Any:
            if weights.version == 2:
                raise EngineError("checksum mismatch")
            return await super().update(weights)

    def act(simulation: Simulation) -> None:
        simulation.generators[0].__class__ = Refuses

    simulation, summary = simulate(sim_config(steps=4, bound=0), tmp_path, act)
    assert simulation.spawns == 1
    assert summary["versions"]["learner"] == 4
    assert summary["versions"]["generators"] == {"generator-0": 4, "generator-1": 4}


def test_a_restarted_generator_has_the_weights_before_it_gets_work(tmp_path: Path) -> None:
    simulation, _ = simulate(sim_config(generators=1), tmp_path, lambda s: at(4.0, s.generators[0].kill))
    assert simulation.spawns == 1
    events = [event for i in range(8) for event in read_story(tmp_path, f"sim/{i}").events]
    causes = {event.detail["cause"] for event in events if event.event == "failed"}
    assert causes == {"generator-0 died: killed"}  # without weights, it would fail at its first work


def test_an_update_of_a_lost_generator_says_nothing_of_its_successor(tmp_path: Path) -> None:
    """It is given up while it takes version 1, which it does all the same; the new one must be given the weights."""

    class Odd(SimGenerator):
        async def update(self, weights: Any) -> Any:
            if weights.version == 1:
                await asyncio.sleep(30.0)
                self._dead = None
            return await super().update(weights)

        async def progress(self) -> int:
            if self._history and asyncio.get_running_loop().time() > 5.0:
                raise WorkerDied(self.name, "lost its connection")
            return await super().progress()

    def act(simulation: Simulation) -> None:
        simulation.generators[0].__class__ = Odd

    config = sim_config(steps=3, bound=0, generators=1, eval={"before": False})
    simulation, summary = simulate(config, tmp_path, act, timing=Timing(lengths=(4, 8), spawn_s=60.0))
    assert simulation.spawns == 1
    assert summary["fates"] == {"trained": 12, "dropped": {}, "pending": 0}
    assert all(b.version == b.oldest for b in simulation.learner.batches)


def test_what_a_reward_worker_refuses_ends_the_run(tmp_path: Path) -> None:
    class Strict(SimRewarder):
        async def score(self, rounds: Any, training: bool) -> Any:
            raise RewardError("parity raised ZeroDivisionError on sim/0#1")

    def act(simulation: Simulation) -> None:
        for rewarder in simulation.rewarders:
            rewarder.__class__ = Strict

    with pytest.raises(RewardError, match="parity raised ZeroDivisionError"):
        simulate(sim_config(), tmp_path, act)


def test_a_stalled_reward_worker_is_replaced(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        at(2.0, simulation.rewarders[0].stall)  # type: ignore[attr-defined]

    simulation, summary = simulate(sim_config(), tmp_path, act)
    assert simulation.spawns == 1
    assert summary["fates"]["trained"] == 20
    assert [n.detail["worker"] for n in read_run(tmp_path).notes if n.event == "worker restarted"] == ["rewarder-0"]


def test_a_store_that_never_answers_ends_the_run(tmp_path: Path) -> None:

    def act(simulation: Simulation) -> None:
        async def hang(group: Any) -> None:
            await asyncio.Future()

        at(1.0, lambda: setattr(simulation.store, "buffered", hang))

    with pytest.raises(EngineError, match="the rollout store did not answer in 120 s"):
        simulate(sim_config(), tmp_path, act)
