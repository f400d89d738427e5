"""Evaluations of simulated runs, and the responses that they leave on disk."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlsys.config.models import Config
from rlsys.errors import HandleLost
from rlsys.ledger.store import RolloutStore
from rlsys.ledger.story import evaluation_files
from rlsys.roles import Handle
from rlsys.sim.drive import RecordingTracker, Simulation, sim_config, simulate
from rlsys.sim.roles import Timing


def responses(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Rows of every file, by the step that is its name."""
    found = {step: pq.read_table(path).to_pylist() for step, path in evaluation_files(run_dir).items()}
    assert all(row["step"] == step for step, rows in found.items() for row in rows)
    return found


def test_every_evaluation_leaves_the_responses_that_its_figures_are_of(tmp_path: Path) -> None:
    config = sim_config(steps=6, bound=0, eval={"prompts": 5, "every": 2, "every_prompts": 3, "samples_per_prompt": 2})
    simulation, _ = simulate(config, tmp_path, timeout_rate=0.2)
    found = responses(tmp_path)
    assert list(found) == [0, 2, 4, 6]
    for step, figures in simulation.tracker.evals:
        rows = found[step]
        scores = [row["score"] for row in rows if row["reward_status"] == "ok"]
        assert {row["prompt_id"] for row in rows} == {f"eval/{i}" for i in range(5 if step in (0, 6) else 3)}
        assert len(rows) == figures["rollouts"]
        assert len(rows) - len(scores) == figures["unscored"]
        assert sum(scores) / len(scores) == pytest.approx(figures["accuracy"])
        assert sum(row["tokens"] for row in rows) / len(rows) == pytest.approx(figures["length_mean"])
        assert {row["reward_detail"] for row in rows if row["reward_status"] != "ok"} <= {"no answer"}
        assert min(span["version"] for row in rows for span in row["version_spans"]) == figures["min_version"] >= step
    assert sum(math.isnan(row["score"]) for rows in found.values() for row in rows) > 0


@pytest.mark.parametrize(("keep", "kept"), [(2, {"eval/0", "eval/1"}), (0, None)])
def test_no_more_is_kept_than_asked_for(tmp_path: Path, keep: int, kept: set[str] | None) -> None:
    _, summary = simulate(sim_config(steps=2, eval={"prompts": 4, "keep_responses": keep}), tmp_path)
    assert summary["eval"]["after"]["prompts"] == 4
    found = responses(tmp_path)
    assert {step: {row["prompt_id"] for row in rows} for step, rows in found.items()} == (
        {} if kept is None else {0: kept, 2: kept}
    )


class Killing(RecordingTracker):
    """Ends the run when the evaluation at step 6 is done, as a crash does."""

    simulation: Simulation

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        super().log_eval(step, metrics, scores)
        if step == 6:
            self.simulation.driver.stop()
            self.simulation.driver.stop()


def kill_at_6(config: Config, run_dir: Path) -> None:
    def act(simulation: Simulation) -> None:
        tracker = Killing()
        tracker.simulation = simulation
        simulation.driver.tracker = simulation.driver.recorder.tracker = tracker

    with pytest.raises(asyncio.CancelledError):
        simulate(config, run_dir, act)
    assert list(evaluation_files(run_dir)) == [0, 3, 6]
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-000004"]


def settings(**evaluation: Any) -> Config:
    return sim_config(steps=8, bound=0, checkpoint={"every": 4}, eval={"prompts": 3, "every": 3, **evaluation})


def test_a_resumed_run_has_the_evaluations_of_an_uninterrupted_one(tmp_path: Path) -> None:
    simulate(settings(), tmp_path / "whole")
    kill_at_6(settings(), tmp_path / "parts")
    simulate(settings(), tmp_path / "parts")
    whole, parts = responses(tmp_path / "whole"), responses(tmp_path / "parts")
    assert list(whole) == [0, 3, 6, 8]
    assert parts == whole


def test_evaluations_after_the_checkpoint_are_gone_when_they_are_not_repeated(tmp_path: Path) -> None:
    kill_at_6(settings(), tmp_path)
    simulate(settings(every=0), tmp_path)
    assert list(responses(tmp_path)) == [0, 3, 8]


def test_responses_that_are_lost_with_their_node_are_sampled_again(tmp_path: Path) -> None:
    class Losing(RolloutStore):
        lost = 0

        async def responses(self, group: Handle) -> list[dict[str, Any]]:
            if self.lost < 2:
                self.lost += 1
                raise HandleLost("the driver cannot have what it was given")
            return await super().responses(group)

    store = Losing(tmp_path / "rollouts")
    config = sim_config(steps=1, eval={"prompts": 3, "after": False})
    simulation, summary = simulate(config, tmp_path, timing=Timing(lengths=(4, 8)), store=store)
    assert store.lost == 2
    assert (summary["eval"]["before"]["failed"], summary["eval"]["before"]["rollouts"]) == (0, 3)
    assert [row["prompt_id"] for row in responses(tmp_path)[0]] == ["eval/0", "eval/1", "eval/2"]
    assert sum(call.count(f"eval/{i}") for g in simulation.generators for call in g.calls for i in range(3)) == 5
