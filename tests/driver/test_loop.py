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

from rlsys.config.models import Config
from rlsys.errors import EngineError, LearnerError, RlsysError, RunDirError
from rlsys.ledger.story import read_run, read_story
from rlsys.sim.clock import run_virtually
from rlsys.sim.drive import Simulation, drive, sim_config
from rlsys.sim.roles import MemoryStore, SimGenerator, SimRewarder, Timing
from rlsys.types import GroupInfo

DEADLINE_S = 100_000.0  # virtual
SLOW = Timing()  # everything takes time


def config(
    steps: int = 5, batch: int = 4, bound: int = 1, generators: int = 2, samples: int = 2, **more: dict[str, Any]
) -> Config:
    sections: dict[str, dict[str, Any]] = {
        "run": {"steps": steps},
        "rollout": {"generators": generators, "samples_per_prompt": samples, "stall_timeout_s": 20.0},
        "driver": {"prompts_per_step": batch, "max_staleness": bound},
        "eval": {"prompts": 3},
        "checkpoint": {"every": 2},
    }
    for name, section in more.items():
        sections[name] = {**sections.get(name, {}), **section}
    return sim_config(**sections)


def run(
    config: Config, directory: Path, act: Callable[[Simulation], Any] = lambda simulation: None, **options: Any
) -> tuple[Simulation, dict[str, Any] | BaseException]:
    """Run to the end in virtual time. `act` is called first and may schedule things; errors are returned."""
    held: list[Simulation] = []

    async def main() -> dict[str, Any]:
        simulation = Simulation(config, directory, **{"timing": SLOW, **options})
        held.append(simulation)
        act(simulation)
        async with asyncio.timeout(DEADLINE_S):
            return await simulation.run()

    try:
        return_value: dict[str, Any] | BaseException = run_virtually(main())
    except (RlsysError, asyncio.CancelledError) as error:
        return_value = error
    return held[0], return_value


def at(seconds: float, action: Callable[[], Any]) -> None:
    asyncio.get_running_loop().call_later(seconds, action)


def every_prompt_has_one_fate(directory: Path, simulation: Simulation) -> dict[str, Any]:
    """The ledger's fates, checked against what the learner was given and what is in the files."""
    story = read_run(directory)
    fates = story.fates
    trained = [i for batch in simulation.learner.batches for i in batch.prompt_ids]
    assert len(trained) == len(set(trained)), "a prompt was trained on twice"
    rows: dict[str, set[str]] = {}
    for path in sorted((directory / "rollouts").glob("*.parquet")):
        for row in pq.read_table(path, columns=["prompt_id", "fate"]).to_pylist():
            rows.setdefault(row["prompt_id"], set()).add(row["fate"])
    assert all(len(kinds) == 1 for kinds in rows.values()), rows
    assert sum(kinds == {"trained"} for kinds in rows.values()) == fates["trained"]
    assert sum(fates["dropped"].values()) + fates["trained"] + fates["pending"] == story.prompts
    return fates


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
            worker = rng.choice(simulation.roles.rewarders)
            assert isinstance(worker, SimRewarder)
            worker.kill()
            return
        generator = rng.choice(simulation.roles.generators)
        assert isinstance(generator, SimGenerator)
        generator.kill() if kind == "kill" else generator.stall()

    def act(simulation: Simulation) -> None:
        for when, kind in faults:
            at(when, lambda kind=kind: harm(simulation, kind))

    simulation, summary = run(
        config(
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
    assert isinstance(summary, dict), summary
    assert [len(b.prompt_ids) for b in simulation.learner.batches] == [batch] * steps
    assert [b.version for b in simulation.learner.batches] == list(range(steps))
    assert all(b.version - b.oldest <= bound for b in simulation.learner.batches)
    fates = every_prompt_has_one_fate(directory, simulation)
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
    simulation, summary = run(
        config(steps=40, batch=64, bound=2, generators=8, samples=1, checkpoint={"every": 0}),
        tmp_path,
        timing=timing,
        with_reference=True,
        store=MemoryStore(),
    )
    assert isinstance(summary, dict)
    assert summary["fates"]["trained"] == 40 * 64
    assert 0 < summary["staleness"]["max"] <= 2
    assert max(len(g.calls) for g in simulation.all_generators) > 10


def test_synchronous_runs_are_the_same_for_any_timing(tmp_path: Path) -> None:
    """S = 0: the same batches, handed to each generator in one call, whoever is fast or slow."""
    states, calls = set(), set()
    for i, timing in enumerate([SLOW, Timing((4, 32), 3.0, 2.0, 0.0, 0.1, 1.0, 5.0), Timing(tokens_per_s=1000.0)]):
        simulation, summary = run(
            config(steps=4, bound=0, batch=5), tmp_path / str(i), timing=timing, seed=i, filters=[DropSome()]
        )
        assert isinstance(summary, dict)
        assert summary["staleness"] == {"mean": 0.0, "max": 0}
        states.add(simulation.learner.state)
        calls.add(tuple(tuple(g.calls) for g in simulation.all_generators))
        for batch in simulation.learner.batches:
            indices = [int(prompt_id.partition("/")[2]) for prompt_id in batch.prompt_ids]
            assert indices == sorted(indices)
    assert len(states) == 1
    assert len(calls) == 1
    first_calls = [call for call in simulation.all_generators[0].calls if call[0].startswith("sim")]
    assert first_calls[0] == ("sim/0", "sim/2", "sim/4")


class DropSome:
    """Drops by score, so that what is dropped depends on the weights."""

    def drop_reason(self, info: GroupInfo) -> str | None:
        return "zero variance" if len(set(info.scores)) == 1 else None


@pytest.mark.parametrize("stop_at", [0.5, 4.0, 9.0, 14.0, 23.0])
def test_a_stopped_and_resumed_synchronous_run_equals_an_uninterrupted_one(tmp_path: Path, stop_at: float) -> None:
    settings = config(steps=6, bound=0, batch=3, checkpoint={"every": 2}, eval={"every": 3})
    whole, summary = run(settings, tmp_path / "whole", filters=[DropSome()])
    assert isinstance(summary, dict)
    first, partial = run(settings, tmp_path / "parts", lambda s: at(stop_at, s.driver.stop), filters=[DropSome()])
    assert isinstance(partial, dict)
    done = partial["steps"]
    second, rest = run(settings, tmp_path / "parts", filters=[DropSome()], seed=5)
    assert isinstance(rest, dict)
    assert first.learner.batches + second.learner.batches == whole.learner.batches
    assert second.learner.state == whole.learner.state
    assert rest["steps"] == 6
    assert rest["tokens"]["trained"] == summary["tokens"]["trained"]
    assert rest["fates"] == summary["fates"]
    if done:
        assert second.tracker.resumes == [done]
        assert rest["wall_s"] > partial["wall_s"]
    assert [s for s, _ in second.tracker.steps] == list(range(done + 1, 7))


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("crash_at", [3.0, 8.0, 13.0, 17.0])
def test_a_crashed_run_resumes_from_its_newest_checkpoint(tmp_path: Path, bound: int, crash_at: float) -> None:
    """A second stop cancels everything at once: nothing is saved after that, as in a crash."""
    settings = config(steps=8, bound=bound, batch=3, checkpoint={"every": 2}, eval={"before": False})

    def crash(simulation: Simulation) -> None:
        simulation.driver.stop()
        simulation.driver.stop()

    first, error = run(settings, tmp_path, lambda s: at(crash_at, lambda: crash(s)), filters=[DropSome()])
    assert isinstance(error, asyncio.CancelledError)
    checkpoints = sorted((tmp_path / "checkpoints").glob("step-*"))
    version = int(checkpoints[-1].name.partition("-")[2]) if checkpoints else 0
    second, summary = run(settings, tmp_path, filters=[DropSome()], seed=3)
    assert isinstance(summary, dict)
    batches = first.learner.batches[:version] + second.learner.batches
    trained = [prompt_id for batch in batches for prompt_id in batch.prompt_ids]
    assert len(trained) == len(set(trained)) == 24 == summary["fates"]["trained"]
    assert [b.version for b in batches] == list(range(8))
    assert all(b.version - b.oldest <= bound for b in batches)
    every_prompt_has_one_fate(tmp_path, second)
    indices = sorted(int(prompt_id.partition("/")[2]) for prompt_id in trained)
    dropped = sum(summary["fates"]["dropped"].values())
    assert indices[-1] < 24 + dropped, "prompts were left out"
    if bound == 0:
        assert summary["fates"]["pending"] == 0
        whole, _ = run(settings, tmp_path / "whole", filters=[DropSome()])
        assert batches == whole.learner.batches
        assert second.learner.state == whole.learner.state


def test_buffered_groups_are_reused_after_a_crash(tmp_path: Path) -> None:
    """A slow learner: at the crash several groups wait for it; they are not sampled again."""
    timing = Timing(step_s=1000.0, lengths=(4, 8))
    settings = config(steps=2, bound=1, batch=4, checkpoint={"every": 0}, eval={"before": False, "after": False})

    def crash(simulation: Simulation) -> None:
        simulation.driver.stop()
        simulation.driver.stop()

    settings = settings.model_copy(update={"learner": settings.learner.model_copy(update={"step_timeout_s": 1e5})})
    run(settings, tmp_path, lambda s: at(15.0, lambda: crash(s)), timing=timing)
    waiting = len(list((tmp_path / "rollouts" / "pending").iterdir()))
    assert waiting == 8
    second, summary = run(settings, tmp_path, timing=timing)
    assert isinstance(summary, dict)
    assert sum(len(g.calls) for g in second.all_generators) == 0
    assert summary["fates"] == {"trained": 8, "dropped": {}, "pending": 0}
    assert [e.event for e in read_story(tmp_path, "sim/0").events][-3:] == ["to be drawn again", "buffered", "trained"]


def test_an_invalid_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(config(steps=4, checkpoint={"every": 2, "keep": 5}), tmp_path)
    saved = tmp_path / "checkpoints" / "step-000004" / "learner" / "learner.json"
    saved.write_text(saved.read_text().replace("4", "5"))
    second, summary = run(config(steps=6, checkpoint={"every": 2, "keep": 5}), tmp_path)
    assert isinstance(summary, dict)
    assert "the content of learner/learner.json has changed" in caplog.text
    assert second.tracker.resumes == [2]
    assert summary["fates"]["trained"] == 24


def test_checkpoints_are_pruned_and_another_config_is_refused(tmp_path: Path) -> None:
    run(config(steps=6, checkpoint={"every": 1, "keep": 2}), tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000005", "step-000006"]
    _, error = run(config(steps=6, samples=3), tmp_path)
    assert isinstance(error, RunDirError)
    assert "another config" in str(error)
    _, error = run(config(steps=6, run={"resume": "never"}), tmp_path)
    assert isinstance(error, RunDirError)
    assert "run.resume is never" in str(error)


def test_dead_generators_are_restarted_and_their_work_goes_elsewhere(tmp_path: Path) -> None:
    timing = Timing(lengths=(40, 60))

    def act(simulation: Simulation) -> None:
        first = simulation.all_generators[0]
        at(3.0, lambda: first.kill("SIGKILL"))

    simulation, summary = run(config(steps=3, eval={"before": False}), tmp_path, act, timing=timing)
    assert isinstance(summary, dict)
    assert summary["fates"] == {"trained": 12, "dropped": {}, "pending": 0}
    assert simulation.spawns == 1
    assert [g.name for g in simulation.roles.generators] == ["generator-0", "generator-1"]
    assert simulation.roles.generators[0] is simulation.all_generators[-1]
    events = [e for i in range(8) for e in read_story(tmp_path, f"sim/{i}").events]
    failed = [e.detail for e in events if e.event == "failed"]
    assert failed
    assert all(detail["worker"] == "generator-0" and "SIGKILL" in detail["cause"] for detail in failed)
    assert [note.event for note in read_run(tmp_path).notes][:2] == ["worker lost", "worker restarted"]


def test_a_stalled_generator_loses_its_work_but_a_slow_one_does_not(tmp_path: Path) -> None:
    slow = Timing(lengths=(300, 400), tokens_per_s=1.0)  # 5 minutes a rollout, with a patience of 20 s
    simulation, summary = run(config(steps=1, bound=0, eval={"before": False}), tmp_path / "slow", timing=slow)
    assert isinstance(summary, dict)
    assert simulation.spawns == 0
    simulation, summary = run(
        config(steps=2, bound=0, eval={"before": False}),
        tmp_path / "stalled",
        lambda s: at(1.0, s.all_generators[0].stall),
    )
    assert isinstance(summary, dict)
    assert simulation.spawns == 1
    assert "no progress for 20 s" in read_run(tmp_path / "stalled").notes[0].detail["cause"]


def test_giving_up_names_the_worker(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        simulation.spawn_fails = lambda name: EngineError("no memory left")
        at(2.0, lambda: [g.kill() for g in simulation.all_generators])

    _, error = run(config(generators=1), tmp_path, act)
    assert isinstance(error, EngineError)
    assert str(error) == "generator-0 failed 4 times in a row, and no other generator is healthy: no memory left"


def test_a_prompt_that_always_fails_is_dropped_with_its_reason(tmp_path: Path) -> None:
    class Cursed(SimGenerator):
        async def _sample(self, prompt: Any, sampling: Any) -> Any:
            if prompt.id == "sim/1":
                raise EngineError("cannot tokenise")
            return await super()._sample(prompt, sampling)

    def act(simulation: Simulation) -> None:
        for generator in simulation.all_generators:
            generator.__class__ = Cursed

    _, summary = run(config(steps=2, rollout={"attempts": 2}), tmp_path, act)
    assert isinstance(summary, dict)
    assert summary["fates"] == {"trained": 8, "dropped": {"generation failed": 1}, "pending": 0}
    story = read_story(tmp_path, "sim/1")
    assert story.prompt["reason"] == "generation failed: 2 attempts, the last: cannot tokenise"
    assert story.prompt["attempts"] == 2


def test_failed_rewards_drop_the_group_when_nothing_is_scored(tmp_path: Path) -> None:
    simulation, summary = run(config(steps=3, samples=1), tmp_path, timeout_rate=0.3)
    assert isinstance(summary, dict)
    assert summary["fates"]["dropped"]["rewards failed"] > 0
    assert summary["fates"]["trained"] == 12
    every_prompt_has_one_fate(tmp_path, simulation)


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    class DropAll:
        def drop_reason(self, info: GroupInfo) -> str | None:
            return "zero variance"

    _, error = run(config(batch=1), tmp_path, filters=[DropAll()])
    assert isinstance(error, RlsysError)
    assert "100 groups in a row were dropped since step 0, the last for 'zero variance'" in str(error)


def test_a_dead_learner_ends_the_run_and_is_named(tmp_path: Path) -> None:
    _, error = run(config(), tmp_path, lambda s: at(5.0, lambda: s.learner.kill("out of memory")))
    assert isinstance(error, LearnerError)
    assert "learner died: out of memory" in str(error)
    assert "goes on from the newest checkpoint" in str(error)


def test_a_learner_that_never_answers_ends_the_run(tmp_path: Path) -> None:
    _, error = run(config(learner={"step_timeout_s": 50.0}), tmp_path, lambda s: at(5.0, s.learner.stall))
    assert isinstance(error, LearnerError)
    assert "within learner.step_timeout_s=50 s" in str(error)


def test_skipped_steps_use_their_prompts_up(tmp_path: Path) -> None:
    simulation, summary = run(config(steps=4, bound=0), tmp_path, skip=lambda step: step == 2)
    assert isinstance(summary, dict)
    assert summary["fates"] == {"trained": 12, "dropped": {"step skipped": 4}, "pending": 0}
    assert simulation.tracker.steps[1][1]["tokens/trained"] == 0


def test_a_generator_that_fails_an_update_is_restarted(tmp_path: Path) -> None:
    class Refuses(SimGenerator):
        async def update(self, weights: Any) -> Any:
            if weights.version == 2:
                raise EngineError("checksum mismatch")
            return await super().update(weights)

    def act(simulation: Simulation) -> None:
        simulation.all_generators[0].__class__ = Refuses

    simulation, summary = run(config(steps=4, bound=0), tmp_path, act)
    assert isinstance(summary, dict)
    assert simulation.spawns == 1
    assert summary["versions"] == {"learner": 4, "generators": {"generator-0": 4, "generator-1": 4}}


def test_the_learner_does_not_wait_for_the_roll_out(tmp_path: Path) -> None:
    """Updates take 30 s each on two generators, steps 1 s: with S = 3 several steps go by meanwhile."""
    timing = Timing(lengths=(1, 2), tokens_per_s=1000.0, score_s=0.0, step_s=1.0, update_s=30.0)
    simulation, summary = run(
        config(steps=12, bound=3, eval={"before": False, "after": False}, weights={"timeout_s": 1000.0}),
        tmp_path,
        timing=timing,
    )
    assert isinstance(summary, dict)
    steps = [end for name, _, end, _ in simulation.tracker.events if name.startswith("step")]
    updates = [(start, end) for name, start, end, lane in simulation.tracker.events if name.startswith("update")]
    assert max(sum(start < step < end for step in steps) for start, end in updates) >= 2
    assert all(a_end <= b_start for (_, a_end), (b_start, _) in itertools.pairwise(updates))
    assert len(updates) < 2 * 13  # only the newest version matters


def test_evaluation_and_checkpoints_do_not_stop_generation(tmp_path: Path) -> None:
    timing = Timing(lengths=(20, 30), step_s=0.1)

    class SlowSave:
        def __init__(self, simulation: Simulation) -> None:
            self.save = simulation.learner.save

        async def __call__(self, directory: Path) -> None:
            await asyncio.sleep(50.0)
            await self.save(directory)

    def act(simulation: Simulation) -> None:
        simulation.learner.save = SlowSave(simulation)  # type: ignore[method-assign]

    simulation, summary = run(
        config(
            steps=3, bound=2, eval={"before": False, "after": False, "every": 1, "prompts": 40}, checkpoint={"every": 1}
        ),
        tmp_path,
        act,
        timing=timing,
    )
    assert isinstance(summary, dict)
    save_start, save_end = next((a, b) for name, a, b, _ in simulation.tracker.events if name == "checkpoint 1")
    during = [e for i in range(12) for e in read_story(tmp_path, f"sim/{i}").events if e.event == "buffered"]
    assert save_end - save_start >= 50.0
    assert len(during) == 12
    assert simulation.tracker.steps[1][1]["wait/learner_for_rollouts_s"] == pytest.approx(0.0, abs=1e-6)
    assert len(simulation.tracker.evals) >= 1


def test_the_figures_of_a_step(tmp_path: Path) -> None:
    """Recomputed from the rollouts on disk."""
    simulation, summary = run(config(steps=3, bound=2, batch=4, samples=3), tmp_path)
    assert isinstance(summary, dict)
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
        assert metrics["loss"] == 0.5
    assert summary["tokens"]["trained"] == trained_tokens
    assert summary["staleness"]["mean"] == pytest.approx(sum(ages) / len(ages))
    assert summary["staleness"]["max"] == max(ages)
    assert simulation.tracker.summaries == [summary]


def test_waiting_is_attributed(tmp_path: Path) -> None:
    """A slow learner: generators wait for it. Slow generators: it waits for them."""
    slow_learner = Timing(lengths=(1, 2), score_s=0.0, step_s=50.0)
    simulation, _ = run(
        config(steps=4, eval={"before": False, "after": False}, learner={"step_timeout_s": 5000.0}),
        tmp_path / "a",
        timing=slow_learner,
    )
    last = simulation.tracker.steps[-2][1]
    assert last["wait/generators_for_learner_s"] > 10 * last["wait/learner_for_rollouts_s"]
    slow_generators = Timing(lengths=(100, 200), tokens_per_s=2.0, score_s=0.0, step_s=0.1)
    simulation, _ = run(config(steps=4, eval={"before": False, "after": False}), tmp_path / "b", timing=slow_generators)
    last = simulation.tracker.steps[-2][1]
    assert last["wait/learner_for_rollouts_s"] > 10 * last["wait/generators_for_learner_s"]


def test_the_cost_function_drives_real_steps() -> None:
    cost = drive(steps=2, prompts_per_step=2, samples=2, on_disk=False)
    assert cost.rollouts == 8
    assert cost.seconds > 0
