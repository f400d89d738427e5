"""Stopped, crashed and resumed runs, on simulated roles in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.models import Config
from rlsys.curricula import Curriculum
from rlsys.curricula.category_bandit import CategoryBandit
from rlsys.curricula.predicted_difficulty import PredictedDifficulty
from rlsys.curricula.success_budget import SuccessBudget
from rlsys.curricula.uncertain_first import UncertainFirst
from rlsys.curricula.variance_promotion import VariancePromotion
from rlsys.driver.recovery import reusable
from rlsys.errors import RunDirError
from rlsys.ledger.story import read_story
from rlsys.sim.drive import SimPrompts, Simulation, at, sim_config, simulate
from rlsys.sim.roles import SimGenerator, Timing
from rlsys.types import GroupInfo

CURRICULA = [CategoryBandit, PredictedDifficulty, SuccessBudget, UncertainFirst, VariancePromotion]


class DropSome:
    """Drops by score, so that what is dropped depends on the weights."""

    def drop_reason(self, info: GroupInfo) -> str | None:
        return "zero variance" if len(set(info.scores)) == 1 else None


def crashed(config: Config, directory: Path, when: float, **options: Any) -> Simulation:
    """A process that is cancelled at once by a second stop: nothing is saved after that, as in a crash."""
    made: list[Simulation] = []

    def act(simulation: Simulation) -> None:
        made.append(simulation)
        at(when, simulation.driver.stop)
        at(when, simulation.driver.stop)

    with pytest.raises(asyncio.CancelledError):
        simulate(config, directory, act, **options)
    return made[0]


def training_calls(generator: SimGenerator) -> list[tuple[str, ...]]:
    return [call for call in generator.calls if call[0].startswith("sim/")]


@pytest.mark.parametrize("stop_at", [0.5, 3.8, 9.0, 23.0])
def test_a_stopped_and_resumed_synchronous_run_equals_an_uninterrupted_one(tmp_path: Path, stop_at: float) -> None:
    settings = sim_config(steps=6, bound=0, batch=3, checkpoint={"every": 2}, eval={"every": 3})
    whole, summary = simulate(settings, tmp_path / "whole", filters=[DropSome()])
    first, partial = simulate(settings, tmp_path / "parts", lambda s: at(stop_at, s.driver.stop), filters=[DropSome()])
    done = partial["steps"]
    second, rest = simulate(settings, tmp_path / "parts", filters=[DropSome()], seed=5)
    assert first.learner.batches + second.learner.batches == whole.learner.batches
    assert second.learner.state == whole.learner.state
    for resumed, uninterrupted in zip(second.generators, whole.generators, strict=True):
        # Not only the same prompts: handed over in the same company, on which an engine's rounding may depend.
        later, all_calls = training_calls(resumed), training_calls(uninterrupted)
        assert later == all_calls[len(all_calls) - len(later) :]
    assert rest["steps"] == 6
    assert rest["tokens"]["trained"] == summary["tokens"]["trained"]
    assert rest["fates"] == summary["fates"]
    if done:
        assert second.tracker.resumes == [done]
        assert rest["wall_s"] > partial["wall_s"]
    assert [s for s, _ in second.tracker.steps] == list(range(done + 1, 7))


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_a_resumed_curriculum_chooses_as_an_uninterrupted_one(tmp_path: Path, curriculum: type[Curriculum]) -> None:
    settings = sim_config(steps=6, bound=0, batch=3, checkpoint={"every": 2}, eval={"every": 0})

    def parts() -> dict[str, Any]:
        options = {"key": "kind"} if curriculum is CategoryBandit else {}
        options |= {"refresh": 1} if curriculum is VariancePromotion else {}
        return {"filters": [DropSome()], "curriculum": curriculum(**options), "prompts": SimPrompts(size=5)}

    whole, _ = simulate(settings, tmp_path / "whole", **parts())
    assert len({row for batch in whole.learner.batches for row in batch.prompt_ids}) == 18, "every draw has its own id"
    first = crashed(settings, tmp_path / "parts", 18.0, **parts())
    assert 0 < len(first.learner.batches) < 6
    second, _ = simulate(settings, tmp_path / "parts", seed=5, **parts())
    assert second.learner.state == whole.learner.state
    assert second.driver.drawing.curriculum.state_dict() == whole.driver.drawing.curriculum.state_dict()
    assert second.learner.batches == whole.learner.batches[-len(second.learner.batches) :]


@pytest.mark.parametrize("curriculum", [PredictedDifficulty, SuccessBudget])
def test_a_curriculum_in_an_asynchronous_run_that_crashes_loses_no_prompt(
    tmp_path: Path, curriculum: type[Curriculum]
) -> None:
    settings = sim_config(steps=8, bound=2, batch=3, checkpoint={"every": 2}, eval={"every": 0})

    def parts() -> dict[str, Any]:
        return {"filters": [DropSome()], "curriculum": curriculum(), "prompts": SimPrompts(size=5)}

    crashed(settings, tmp_path, 12.0, **parts())
    _, summary = simulate(settings, tmp_path, seed=5, **parts())
    assert summary["steps"] == 8
    assert summary["fates"]["trained"] == 24


def test_a_candidate_has_the_value_that_the_critic_gave_it(tmp_path: Path) -> None:
    """Also when prompts are drawn while the critic is at work."""
    told: dict[int, float] = {}
    moved = []

    def act(simulation: Simulation) -> None:
        learner, drawing = simulation.learner, simulation.driver.drawing
        ask, judged = learner.prompt_values, drawing.curriculum.judged

        async def asked(prompts: Any) -> Any:
            before = drawing.next_index
            values = await ask(prompts)
            moved.append(drawing.next_index - before)
            told.clear()
            told.update(zip((int(p.id.split("/")[1].split("@")[0]) for p in prompts), values, strict=True))
            return values

        def heard(values: Any) -> None:
            assert dict(values) == told
            judged(values)

        learner.prompt_values, drawing.curriculum.judged = asked, heard  # type: ignore[method-assign]

    settings = sim_config(steps=10, batch=3, bound=2, eval={"every": 0})
    parts = {"curriculum": PredictedDifficulty(), "prompts": SimPrompts(size=500), "filters": [DropSome()]}
    simulate(settings, tmp_path, act, **parts)
    assert max(moved) > 0, "the case was there"


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("crash_at", [3.0, 8.0, 17.0])
def test_a_crashed_run_resumes_from_its_newest_checkpoint(
    tmp_path: Path, check_fates: Callable[[Path], Any], bound: int, crash_at: float
) -> None:
    settings = sim_config(steps=8, bound=bound, batch=3, checkpoint={"every": 2}, eval={"before": False})
    first = crashed(settings, tmp_path, crash_at, filters=[DropSome()])
    checkpoints = sorted((tmp_path / "checkpoints").glob("step-*"))
    version = int(checkpoints[-1].name.partition("-")[2]) if checkpoints else 0
    second, summary = simulate(settings, tmp_path, filters=[DropSome()], seed=3)
    batches = first.learner.batches[:version] + second.learner.batches
    trained = [prompt_id for batch in batches for prompt_id in batch.prompt_ids]
    assert len(trained) == len(set(trained)) == 24 == summary["fates"]["trained"]
    assert [b.version for b in batches] == list(range(8))
    assert all(b.version - b.oldest <= bound for b in batches)
    check_fates(tmp_path)
    indices = sorted(int(prompt_id.partition("/")[2]) for prompt_id in trained)
    dropped = sum(summary["fates"]["dropped"].values())
    assert indices[-1] < 24 + dropped, "prompts were left out"
    if bound == 0:
        assert summary["fates"]["pending"] == 0
        whole, _ = simulate(settings, tmp_path / "whole", filters=[DropSome()])
        assert batches == whole.learner.batches
        assert second.learner.state == whole.learner.state


def test_buffered_groups_are_reused_after_a_crash(tmp_path: Path) -> None:
    """A slow learner: at the crash several groups wait for it; they are not sampled again."""
    timing = Timing(step_s=1000.0, lengths=(4, 8))
    settings = sim_config(
        *(2, 4, 1),
        learner={"step_timeout_s": 1e5},
        checkpoint={"every": 0},
        eval={"before": False, "after": False},
    )
    crashed(settings, tmp_path, 15.0, timing=timing)
    assert [read_story(tmp_path, f"sim/{i}").prompt["state"] for i in range(8)] == ["buffered"] * 8
    second, summary = simulate(settings, tmp_path, timing=timing)
    assert sum(len(g.calls) for g in second.generators) == 0
    assert summary["fates"] == {"trained": 8, "dropped": {}, "pending": 0}
    assert summary["tokens"]["generated"] == summary["tokens"]["trained"] > 0
    assert [e.event for e in read_story(tmp_path, "sim/0").events][-3:] == ["reused", "buffered", "trained"]


def test_an_invalid_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    simulate(sim_config(steps=4, checkpoint={"every": 2, "keep_last": 5}), tmp_path)
    saved = tmp_path / "checkpoints" / "step-000004" / "learner" / "learner.json"
    saved.write_text(saved.read_text().replace("4", "5"))
    second, summary = simulate(sim_config(steps=6, checkpoint={"every": 2, "keep_last": 5}), tmp_path)
    assert "the content of learner/learner.json has changed" in caplog.text
    assert second.tracker.resumes == [2]
    assert summary["fates"]["trained"] == 24


def test_checkpoints_are_pruned_and_another_config_is_refused(tmp_path: Path) -> None:
    simulate(sim_config(steps=6, checkpoint={"every": 1, "keep_last": 2}), tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-000005", "step-000006"]
    with pytest.raises(RunDirError, match="another config"):
        simulate(sim_config(steps=6, samples=3), tmp_path)
    with pytest.raises(RunDirError, match=r"run\.resume is never"):
        simulate(sim_config(run={"steps": 6, "resume": "never"}), tmp_path)


def test_a_crash_before_the_first_checkpoint_starts_over(tmp_path: Path) -> None:
    settings = sim_config(steps=4, bound=0, checkpoint={"every": 0})
    crashed(settings, tmp_path, 9.0)
    second, summary = simulate(settings, tmp_path)
    whole, _ = simulate(settings, tmp_path / "whole")
    assert second.tracker.resumes == [0]
    assert second.learner.batches == whole.learner.batches
    assert summary["fates"] == {"trained": 16, "dropped": {}, "pending": 0}


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    simulate(sim_config(steps=3, bound=0), tmp_path / "parts")
    second, summary = simulate(sim_config(steps=5, bound=0), tmp_path / "parts")
    whole, _ = simulate(sim_config(steps=5, bound=0), tmp_path / "whole")
    assert second.learner.state == whole.learner.state
    assert summary["eval"]["after"]["step"] == 5
    again, _ = simulate(sim_config(steps=5, bound=0), tmp_path / "parts")
    assert again.learner.batches == []
    assert again.tracker.evals == []


@given(
    versions=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=30),
    version=st.integers(0, 6),
    batch=st.integers(1, 4),
    bound=st.integers(1, 3),
    room=st.integers(0, 30),
)
def test_what_is_reused_can_be_trained_within_the_bound(
    versions: list[tuple[int, int]], version: int, batch: int, bound: int, room: int
) -> None:
    """Oldest first in batches from `version` on, each reused group is trained at most `bound` versions late."""
    infos = [GroupInfo(f"p{i}", i, "g", (1,), old, old + span) for i, (old, span) in enumerate(versions)]
    kept = reusable(infos, version, batch, bound, room)
    assert len(kept) <= room
    for place, info in enumerate(kept):
        assert info.max_version <= version
        assert version + place // batch - info.min_version <= bound
    fresh = [info for info in infos if info.min_version == info.max_version == version]
    assert len(reusable(fresh, version, batch, bound, room)) == min(len(fresh), room, (bound + 1) * batch)
    assert reusable(infos, version, batch, 0, room) == []


def test_a_run_can_end_earlier_than_it_was_meant_to(tmp_path: Path) -> None:
    crashed(sim_config(steps=9, bound=3, checkpoint={"every": 1}), tmp_path, 9.0, timing=Timing(step_s=3.0))
    version = max(int(p.name.partition("-")[2]) for p in (tmp_path / "checkpoints").glob("step-*"))
    _, summary = simulate(sim_config(steps=version + 1, bound=3), tmp_path)
    assert summary["fates"]["trained"] == 4 * (version + 1)
