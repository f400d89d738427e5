"""The whole loop on simulated roles, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.ledger.story import read_story
from rlsys.sim.drive import Simulation, at, drive, sim_config, simulate
from rlsys.sim.roles import MemoryStore, SimGenerator, SimRewarder, Timing
from rlsys.types import GroupInfo

SLOW = Timing()  # everything takes time


class DropSome:
    """Drops by score, so that what is dropped depends on the weights."""

    def drop_reason(self, info: GroupInfo) -> str | None:
        return "zero variance" if len(set(info.scores)) == 1 else None


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bound=st.integers(0, 3),
    batch=st.integers(1, 4),
    generators=st.integers(1, 3),
    cap=st.none() | st.integers(1, 3),
    failure_rate=st.sampled_from([0.0, 0.1]),
    timeout_rate=st.sampled_from([0.0, 0.3]),
    with_reference=st.booleans(),
    faults=st.lists(st.tuples(st.floats(0.5, 60.0), st.sampled_from(["kill", "stall", "kill rewarder"])), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_random_schedules_with_failures(
    tmp_path_factory: pytest.TempPathFactory,
    check_fates: Callable[[Path], dict[str, Any]],
    bound: int,
    batch: int,
    generators: int,
    cap: int | None,
    failure_rate: float,
    timeout_rate: float,
    with_reference: bool,
    faults: list[tuple[float, str]],
    seed: int,
) -> None:
    """The bound holds for every batch, the run ends, every prompt has one fate: whatever dies or stalls meanwhile."""
    directory = tmp_path_factory.mktemp("run")
    steps = 4
    rng = random.Random(seed)

    def harm(simulation: Simulation, kind: str) -> None:
        if kind == "kill rewarder":
            worker = rng.choice(simulation.rewarders)
            assert isinstance(worker, SimRewarder)
            worker.kill()
            return
        generator = rng.choice(simulation.generators)
        assert isinstance(generator, SimGenerator)
        generator.kill() if kind == "kill" else generator.stall()

    def act(simulation: Simulation) -> None:
        for when, kind in faults:
            at(when, lambda kind=kind: harm(simulation, kind))

    simulation, summary = simulate(
        sim_config(
            steps=steps,
            batch=batch,
            bound=bound,
            generators=generators,
            driver={"max_groups_in_flight": cap},
            rollout={"attempts": 6},
            eval={"every": 2},
        ),
        directory,
        act,
        seed=seed,
        failure_rate=failure_rate,
        timeout_rate=timeout_rate,
        with_reference=with_reference,
    )
    assert [len(b.prompt_ids) for b in simulation.learner.batches] == [batch] * steps
    assert [b.version for b in simulation.learner.batches] == list(range(steps))
    assert all(b.version - b.oldest <= bound for b in simulation.learner.batches)
    fates = check_fates(directory)
    assert fates == summary["fates"]
    assert fates["trained"] == steps * batch
    assert fates["pending"] == 0
    assert "stale" not in fates["dropped"]
    assert summary["staleness"]["max"] == max(b.version - b.oldest for b in simulation.learner.batches)
    assert summary["eval"]["before"]["prompts"] == summary["eval"]["after"]["prompts"] == 3
    assert summary["versions"]["learner"] == steps
    assert [step for step, _ in simulation.tracker.steps] == list(range(1, steps + 1))
    assert all(math.isfinite(v) for _, metrics in simulation.tracker.steps for v in metrics.values())


def test_thousands_of_groups_pass_in_moments(tmp_path: Path) -> None:
    """An hour of eight generators; long rollouts meet several updates, and spans say so."""
    timing = Timing(lengths=(4, 200), step_s=3.0)
    simulation, summary = simulate(
        sim_config(steps=40, batch=64, bound=2, generators=8, samples=1, checkpoint={"every": 0}),
        tmp_path,
        timing=timing,
        with_reference=True,
        store=MemoryStore(),
    )
    assert summary["fates"]["trained"] == 40 * 64
    assert 0 < summary["staleness"]["max"] <= 2
    assert max(len(g.calls) for g in simulation.generators) > 10


def test_synchronous_runs_are_the_same_for_any_timing(tmp_path: Path) -> None:
    """S = 0: the same batches, handed to each generator in one call, whoever is fast or slow."""
    states, calls = set(), set()
    for i, timing in enumerate([SLOW, Timing((4, 32), 3.0, 2.0, 0.0, 0.1, 1.0, 5.0), Timing(tokens_per_s=1000.0)]):
        simulation, summary = simulate(
            sim_config(steps=4, bound=0, batch=5), tmp_path / str(i), timing=timing, seed=i, filters=[DropSome()]
        )
        assert summary["staleness"] == {"mean": 0.0, "max": 0}
        states.add(simulation.learner.state)
        calls.add(tuple(tuple(g.calls) for g in simulation.generators))
        for batch in simulation.learner.batches:
            indices = [int(prompt_id.partition("/")[2]) for prompt_id in batch.prompt_ids]
            assert indices == sorted(indices)
    assert len(states) == 1
    assert len(calls) == 1
    first_calls = [call for call in simulation.generators[0].calls if call[0].startswith("sim")]
    assert first_calls[0] == ("sim/0", "sim/2", "sim/4")


def test_synchronous_evaluations_and_checkpoints_come_before_new_prompts(tmp_path: Path) -> None:
    """With S = 0 nothing else is sampled meanwhile."""
    sampled: list[tuple[float, str]] = []

    class Noting(SimGenerator):
        async def generate(self, prompts: Any, sampling: Any) -> Any:
            sampled.extend((asyncio.get_running_loop().time(), prompt.id) for prompt in prompts)
            return await super().generate(prompts, sampling)

    def act(simulation: Simulation) -> None:
        for generator in simulation.generators:
            generator.__class__ = Noting

    config = sim_config(steps=4, bound=0, eval={"every": 1, "prompts": 6}, checkpoint={"every": 1})
    simulation, _ = simulate(config, tmp_path, act)
    for name, start, end, _ in simulation.tracker.events:
        if name.startswith("evaluation"):
            meanwhile = {prompt_id for when, prompt_id in sampled if start <= when < end}
            assert meanwhile == {f"eval/{i}" for i in range(6)}
    drawn_at = {prompt_id: when for when, prompt_id in sampled}
    for step in (1, 2, 3):
        copied_at = next(end for name, _, end, _ in simulation.tracker.events if name == f"copy {step}")
        assert drawn_at[f"sim/{4 * step}"] >= copied_at


def test_skipped_steps_use_their_prompts_up(tmp_path: Path) -> None:
    simulation, summary = simulate(sim_config(steps=4, bound=0), tmp_path, skip=lambda step: step == 2)
    assert summary["fates"] == {"trained": 12, "dropped": {"step skipped": 4}, "pending": 0}
    assert simulation.tracker.steps[1][1]["tokens/trained"] == 0


def test_the_learner_does_not_wait_for_the_roll_out(tmp_path: Path) -> None:
    """Updates take 30 s each on two generators, steps 1 s: with S = 3 several steps go by meanwhile."""
    timing = Timing(lengths=(1, 2), tokens_per_s=1000.0, score_s=0.0, step_s=1.0, update_s=30.0)
    simulation, _ = simulate(
        sim_config(steps=12, bound=3, eval={"before": False, "after": False}, weights={"timeout_s": 1000.0}),
        tmp_path,
        timing=timing,
    )
    steps = [end for name, _, end, _ in simulation.tracker.events if name.startswith("step")]
    updates = [(start, end) for name, start, end, lane in simulation.tracker.events if name.startswith("update")]
    assert max(sum(start < step < end for step in steps) for start, end in updates) >= 2
    assert all(a_end <= b_start for (_, a_end), (b_start, _) in itertools.pairwise(updates))
    assert len(updates) < 2 * 13  # only the newest version matters


def test_evaluation_and_checkpoints_stop_neither_generation_nor_the_learner(tmp_path: Path) -> None:
    timing = Timing(lengths=(20, 30), step_s=0.1)

    class SlowSave:
        def __init__(self, simulation: Simulation) -> None:
            self.save = simulation.learner.save

        async def __call__(self, directory: Path) -> Any:
            writing = await self.save(directory)

            async def write() -> Any:
                await asyncio.sleep(50.0)
                return await writing

            return write()

    def act(simulation: Simulation) -> None:
        simulation.learner.save = SlowSave(simulation)  # type: ignore[method-assign]

    simulation, _ = simulate(
        sim_config(
            steps=4, bound=2, eval={"before": False, "after": False, "every": 1, "prompts": 40}, checkpoint={"every": 3}
        ),
        tmp_path,
        act,
        timing=timing,
    )
    events = {name: (start, end) for name, start, end, _ in simulation.tracker.events}
    save_start, save_end = events["checkpoint 3"]
    assert save_end - save_start >= 50.0
    assert save_start < events["step 4"][0] < events["step 4"][1] < save_end
    during = [e for i in range(16) for e in read_story(tmp_path, f"sim/{i}").events if e.event == "buffered"]
    assert len(during) == 16
    assert len(simulation.tracker.evals) >= 1


def test_the_figures_of_a_step(tmp_path: Path) -> None:
    """Recomputed from the rollouts on disk."""
    simulation, summary = simulate(sim_config(steps=3, bound=2, batch=4, samples=3), tmp_path)
    ages, trained_tokens = [], 0
    for step, metrics in simulation.tracker.steps:
        rows = pq.read_table(tmp_path / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
        lengths = [len(row["token_ids"]) for row in rows]
        scores = [row["score"] for row in rows]
        here = [
            step - 1 - s["version"] for row in rows for s in row["version_spans"] for _ in range(s["start"], s["end"])
        ]
        assert len(here) == sum(lengths)
        ages += here
        trained_tokens += sum(lengths)
        assert metrics["reward/mean"] == pytest.approx(sum(scores) / len(scores))
        assert metrics["rollout/length_mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert metrics["rollout/length_max"] == max(lengths)
        assert metrics["staleness/mean"] == pytest.approx(sum(here) / len(here))
        assert metrics["staleness/max"] == max(here)
        assert metrics["tokens/trained"] == sum(lengths)
        assert metrics["weights/probe_difference"] == 0.0
        assert metrics["weights/pause_s"] == pytest.approx(0.02)
        assert metrics["learner/loss"] == 0.5
    assert summary["tokens"]["trained"] == trained_tokens
    assert summary["staleness"]["mean"] == pytest.approx(sum(ages) / len(ages))
    assert summary["staleness"]["max"] == max(ages)
    assert simulation.tracker.summaries == [summary]


def test_samples_for_people_say_what_became_of_them(tmp_path: Path) -> None:
    config = sim_config(steps=4, batch=4, trackers={"wandb": {"table_every": 2, "table_rows": 3}})
    simulation, _ = simulate(config, tmp_path, skip=lambda step: step == 2)
    samples = simulation.tracker.samples
    assert {row.step for row in samples} == {2, 4}
    assert all(row.components == {"parity": row.score} for row in samples)
    trained = [row for row in samples if row.fate == "trained"]
    skipped = [row for row in samples if row.fate != "trained"]
    # the simulated learner says the spread of the scores for the size of the advantage
    assert {row.advantage for row in trained} <= {0.0, 1.0}
    assert {(row.fate, row.advantage) for row in skipped} == {("dropped: step skipped: non-finite gradient", None)}


def test_waiting_is_attributed(tmp_path: Path) -> None:
    """A slow learner: generators wait for it. Slow generators: it waits for them."""
    slow_learner = Timing(lengths=(1, 2), score_s=0.0, step_s=50.0)
    simulation, _ = simulate(
        sim_config(steps=4, eval={"before": False, "after": False}, learner={"step_timeout_s": 5000.0}),
        tmp_path / "a",
        timing=slow_learner,
    )
    last = simulation.tracker.steps[-2][1]
    assert last["wait/generators_for_learner_s"] > 10 * last["wait/learner_for_rollouts_s"]
    slow_generators = Timing(lengths=(100, 200), tokens_per_s=2.0, score_s=0.0, step_s=0.1)
    simulation, _ = simulate(
        sim_config(steps=4, eval={"before": False, "after": False}), tmp_path / "b", timing=slow_generators
    )
    last = simulation.tracker.steps[-2][1]
    assert last["wait/learner_for_rollouts_s"] > 10 * last["wait/generators_for_learner_s"]


def test_the_cost_function_drives_real_steps() -> None:
    cost = drive(steps=2, prompts_per_step=2, samples=2, on_disk=False)
    assert cost.rollouts == 8
    assert cost.seconds > 0
