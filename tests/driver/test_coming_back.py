"""The learner, the reference, and what is still starting: they come back, and nothing is done twice or differently."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlsys.config.models import Config
from rlsys.errors import EngineError, WorkerDied
from rlsys.ledger.story import read_run, read_story
from rlsys.roles import Probe, PublishedWeights
from rlsys.sim.drive import Simulation, at, sim_config, simulate
from rlsys.sim.roles import SimGenerator, SimLearner, SimReference, Timing

Act = Callable[[Simulation], None]


def settings(bound: int, **sections: Any) -> Config:
    defaults: dict[str, Any] = {"checkpoint": {"every": 3}, "eval": {"every": 3}}
    return sim_config(**{"steps": 8, "bound": bound, "batch": 3, **defaults, **sections})


def trained(simulation: Simulation) -> dict[int, set[tuple[str, ...]]]:
    """What every learner of the run was given for each step."""
    batches: dict[int, set[tuple[str, ...]]] = {}
    for learner in simulation.learners:
        for batch in learner.batches:
            batches.setdefault(batch.version, set()).add(batch.prompt_ids)
    return batches


def lengths(run_dir: Path) -> dict[tuple[str, int], int]:
    """Tokens of every rollout on disk."""
    tables = (
        pq.read_table(path, columns=["prompt_id", "sample", "text"]) for path in run_dir.glob("rollouts/*.parquet")
    )
    return {(row["prompt_id"], row["sample"]): len(row["text"]) for table in tables for row in table.to_pylist()}


def kill_at(seconds: float, *kinds: str) -> Act:
    def act(simulation: Simulation) -> None:
        for kind in kinds:
            at(seconds, lambda kind=kind: getattr(simulation, kind)[-1].kill("SIGKILL"))  # type: ignore[misc]

    return act


@pytest.mark.parametrize("when", [0.0, 4.5, 9.9, 15.0])
@pytest.mark.parametrize("kinds", [("learners",), ("references",), ("generators",), ("learners", "references")])
def test_with_a_bound_of_0_a_death_changes_nothing(
    tmp_path: Path, kinds: tuple[str, ...], when: float, check_fates: Callable[[Path], Any]
) -> None:
    whole, undisturbed = simulate(settings(0), tmp_path / "whole", with_reference=True)
    hit, summary = simulate(settings(0), tmp_path / "hit", kill_at(when, *kinds), with_reference=True)
    assert hit.spawns == len(kinds)
    assert hit.learner.state == whole.learner.state
    assert summary["fates"] == undisturbed["fates"] == check_fates(tmp_path / "hit")
    assert summary["tokens"]["trained"] == undisturbed["tokens"]["trained"]
    assert all(len(given) == 1 for given in trained(hit).values())


@pytest.mark.parametrize(("bound", "when"), [(1, 0.0), (1, 5.0), (1, 8.0), (3, 6.5), (3, 11.0)])
def test_a_rebuilt_learner_repeats_its_steps_from_the_store(
    tmp_path: Path, bound: int, when: float, check_fates: Callable[[Path], Any]
) -> None:
    hit, summary = simulate(settings(bound), tmp_path, kill_at(when, "learners"), with_reference=True)
    assert check_fates(tmp_path) == {"trained": 24, "dropped": {}, "pending": 0} == summary["fates"]
    given = trained(hit)
    assert sorted(given) == list(range(8))
    assert all(len(batches) == 1 for batches in given.values()), "a step is repeated with the batch that it had"
    assert [step for step, _ in hit.tracker.steps] == list(range(1, 9)), "and is told of once"
    first, second = hit.learners
    repeated = [batch.version for batch in second.batches if batch in first.batches]
    newest = max((v for v in (0, 3, 6) if v <= len(first.batches)), default=0)
    assert repeated == list(range(newest, len(first.batches)))[: len(repeated)]


def test_deaths_do_not_favour_short_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is long is in more deaths: it is sampled again with its own seed, and so as long as it would have been."""

    async def same_weights(self: SimLearner) -> PublishedWeights:  # so that a prompt's seed alone says what is sampled
        return PublishedWeights(self.version, {}, "the same", Probe((1, 2), (-0.5,)), gather_s=0.01)

    def kill_now_and_then(simulation: Simulation) -> None:
        for i in range(1, 40):
            at(2.7 * i, lambda i=i: simulation.generators[-1 - i % 2].kill("SIGKILL"))  # type: ignore[misc]

    monkeypatch.setattr(SimLearner, "publish", same_weights)
    config = settings(2, steps=30, batch=4, samples=3)
    timing = Timing(lengths=(2, 40), tokens_per_s=16.0)
    _, undisturbed = simulate(config, tmp_path / "whole", timing=timing)
    hit, summary = simulate(config, tmp_path / "hit", kill_now_and_then, timing=timing)
    assert hit.spawns > 10
    assert summary["fates"] == undisturbed["fates"] == {"trained": 120, "dropped": {}, "pending": 0}
    assert lengths(tmp_path / "hit") == lengths(tmp_path / "whole")


def test_the_generators_go_on_while_the_learner_is_rebuilt(tmp_path: Path) -> None:
    config = settings(2, checkpoint={"every": 0}, eval={"before": False})
    hit, _ = simulate(config, tmp_path, lambda s: at(6.0, s.learner.kill))
    lost, rebuilt = (
        next(n.position for n in read_run(tmp_path).notes if n.event == event)
        for event in ("worker lost", "learner rebuilt")
    )
    stories = [read_story(tmp_path, f"sim/{i}").events for i in range(24)]
    assert sum(lost < e.position < rebuilt for events in stories for e in events if e.event == "sampled") >= 3
    assert len(hit.learners) == 2


@pytest.mark.parametrize(("update", "every"), [("every", 2), ("moving_average", 1), ("moving_average", 3)])
@pytest.mark.parametrize("when", [3.0, 8.0, 17.0])
@pytest.mark.parametrize("kinds", [("references",), ("references", "learners")])
def test_a_reference_that_moves_comes_back_as_it_was(
    tmp_path: Path, update: str, every: int, when: float, kinds: tuple[str, ...]
) -> None:
    config = settings(0, reference={"update": update, "every": every})
    whole, _ = simulate(config, tmp_path / "whole", with_reference=True)
    hit, _ = simulate(config, tmp_path / "hit", kill_at(when, *kinds), with_reference=True)
    assert hit.learner.state == whole.learner.state
    assert hit.reference.state == whole.reference.state
    assert hit.reference.versions == whole.reference.versions


@pytest.mark.parametrize("moment", ["step", "publish", "save", "load"])
def test_a_learner_that_dies_while_it_does_something(tmp_path: Path, moment: str) -> None:
    class Dies(SimLearner):
        deaths = 0

    async def die(self: SimLearner, *arguments: Any) -> Any:
        if self.version >= 4 and Dies.deaths < 2 and hit[0].spawns < 3:
            Dies.deaths += 1
            self.kill(f"in {moment}")
        return await getattr(SimLearner, moment)(self, *arguments)

    hit: list[Simulation] = []

    def act(simulation: Simulation) -> None:
        hit.append(simulation)
        if moment == "load":  # of the first that has to
            at(9.0, simulation.learner.kill)
        setattr(Dies, moment, die)
        simulation.learner.__class__ = Dies

    config = settings(0, checkpoint={"every": 2})
    whole, _ = simulate(config, tmp_path / "whole")
    simulation, summary = simulate(config, tmp_path / "hit", act)
    assert simulation.spawns >= 1
    assert simulation.learner.state == whole.learner.state
    assert summary["fates"] == {"trained": 24, "dropped": {}, "pending": 0}


def test_past_the_bound_the_run_ends_and_says_how_often(tmp_path: Path) -> None:
    async def no_memory(self: SimLearner, items: Any) -> Any:
        self.kill("out of memory")
        return await SimLearner.step(self, items)

    class Dies(SimLearner):
        step = no_memory  # type: ignore[assignment]

    def act(simulation: Simulation) -> None:
        for learner in simulation.learners:
            learner.__class__ = Dies
        simulation.learners = _Cursed(simulation.learners)

    class _Cursed(list[SimLearner]):
        def append(self, learner: SimLearner) -> None:
            learner.__class__ = Dies
            super().append(learner)

    message = "^learner failed 3 times in a row, and there is no other: learner died: out of memory$"
    with pytest.raises(EngineError, match=message):
        simulate(sim_config(driver={"restarts": 2}), tmp_path, act)
    assert [n.event for n in read_run(tmp_path).notes].count("worker lost") == 3


def test_a_learner_that_hangs_is_noticed_by_its_silence(tmp_path: Path) -> None:
    config = settings(1, driver={"prompts_per_step": 3, "max_staleness": 1, "silence_timeout_s": 30.0})
    simulation, summary = simulate(config, tmp_path, lambda s: at(5.0, s.learner.stall))
    assert summary["fates"]["trained"] == 24
    [lost] = [n for n in read_run(tmp_path).notes if n.event == "worker lost"]
    assert lost.detail["cause"] == "gave no sign of life for 30 s"
    assert simulation.tracker.incidents[0][0] == "learner hangs"


def test_a_step_that_takes_too_long_is_tried_again(tmp_path: Path) -> None:
    class Slow(SimLearner):
        async def step(self, items: Any) -> Any:
            await asyncio.Future()

    def act(simulation: Simulation) -> None:
        simulation.learner.__class__ = Slow

    simulate(settings(0, learner={"step_timeout_s": 50.0}), tmp_path, act)
    [lost] = [n for n in read_run(tmp_path).notes if n.event == "worker lost"]
    assert lost.detail["cause"] == "did not take step 1 within learner.step_timeout_s=50 s"


def test_a_group_that_kills_the_reference_is_dropped_and_its_neighbours_are_not(tmp_path: Path) -> None:
    class Fragile(SimReference):
        async def logprobs(self, groups: Any) -> Any:
            if any(group.prompt.id == "sim/4" for group in groups):
                self.kill("segmentation fault")
            return await super().logprobs(groups)

    class Cursed(list[SimReference]):
        def append(self, reference: SimReference) -> None:
            reference.__class__ = Fragile
            super().append(reference)

    def act(simulation: Simulation) -> None:
        simulation.reference.__class__ = Fragile
        simulation.references = Cursed(simulation.references)

    config = settings(0, rollout={"attempts": 2})
    _, summary = simulate(config, tmp_path, act, with_reference=True)
    assert summary["fates"] == {"trained": 24, "dropped": {"reference failed": 1}, "pending": 0}


def test_with_a_bound_of_0_the_reference_scores_a_batch_as_the_learner_takes_it(tmp_path: Path) -> None:
    scored: list[list[str]] = []

    class Telling(SimReference):
        async def logprobs(self, groups: Any) -> Any:
            scored.append([group.prompt.id for group in groups])
            return await super().logprobs(groups)

    def act(simulation: Simulation) -> None:
        simulation.reference.__class__ = Telling
        made.append(simulation)

    made: list[Simulation] = []
    simulate(settings(0), tmp_path, act, with_reference=True)
    assert scored == [list(batch.prompt_ids) for batch in made[0].learner.batches]


@pytest.mark.parametrize("name", ["generator-0", "rewarder-0", "learner", "reference"])
def test_what_dies_while_it_starts_is_started_again(tmp_path: Path, name: str) -> None:
    failures = iter([WorkerDied(name, "SIGKILL"), EngineError("out of memory")])

    def act(simulation: Simulation) -> None:
        del simulation._ready[name]
        simulation.spawn_fails = lambda asked: next(failures, None) if asked == name else None

    _, summary = simulate(settings(1), tmp_path, act, with_reference=True)
    assert summary["fates"]["trained"] == 24
    notes = [n.event for n in read_run(tmp_path).notes if n.detail.get("worker") == name]
    assert notes == ["start failed", "start failed", "worker joined"]


def test_with_a_bound_of_0_what_was_handed_over_together_is_handed_over_together_again(tmp_path: Path) -> None:
    """Also what had been answered: which requests an engine computes together decides how it rounds."""

    class DiesLate(SimGenerator):
        async def _sample(self, prompt: Any, sampling: Any) -> Any:
            generated = await super()._sample(prompt, sampling)
            if prompt.id == "sim/5":
                self.kill("SIGKILL")
            return generated

    def act(simulation: Simulation) -> None:
        simulation.generators[0].__class__ = DiesLate

    config = settings(0, rollout={"generators": 1}, eval={"before": False, "after": False})
    simulation, summary = simulate(config, tmp_path, act)
    first, second = simulation.generators
    assert first.calls[-1] == second.calls[0] == ("sim/3", "sim/4", "sim/5")
    assert summary["fates"] == {"trained": 24, "dropped": {}, "pending": 0}
    assert summary["tokens"]["generated"] == summary["tokens"]["trained"], "what was sampled twice counts once"
