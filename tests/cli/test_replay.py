"""What `rlsys replay` refuses before anything starts, how it compares, and what it writes. Real steps: tests/e2e."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlsys.batches import build_train_batch, collate, select_rows
from rlsys.cli.repeat import Trace, table_of
from rlsys.cli.replay import compare, logged_values, replayed_values, table, verdict
from rlsys.config.loading import dump_config
from rlsys.metrics import Last, Max, Mean, Sum
from rlsys.roles import StepReport
from rlsys.sim.drive import Simulation, sim_config
from rlsys.trackers.jsonl import METRICS, JsonlTracker
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, VersionSpan

# ---- before anything starts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended after 3 of 5 steps, with simulated roles."""
    path = tmp_path_factory.mktemp("run")
    config = sim_config(steps=3, batch=2)
    dump_config(config.model_copy(update={"run": config.run.model_copy(update={"steps": 5})}), path / "config.yaml")

    async def main() -> None:
        simulation = Simulation(config, path)
        simulation.driver.tracker = simulation.driver.recorder.tracker = JsonlTracker(path)
        await simulation.run()

    asyncio.run(main())
    return path


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (4, "--step 4: run has not come there yet, it has trained steps 1 to 3 of 5"),
        (9, "--step 9: run has no such step, it has trained steps 1 to 3"),
    ],
)
def test_a_step_that_was_not_trained(rlsys: Callable, run_dir: Path, step: int, says: str) -> None:
    done = rlsys("replay", "run", "--step", step)
    assert (done.code, done.err) == (2, f"rlsys: {says}\n")


def test_no_step_at_all(rlsys: Callable, run_dir: Path) -> None:
    (run_dir / METRICS).unlink()
    done = rlsys("replay", "run", "--step", 1)
    assert (done.code, done.err) == (2, "rlsys: --step 1: run has not trained a step yet\n")


def test_rollouts_that_are_gone(rlsys: Callable, run_dir: Path) -> None:
    """There is a checkpoint of step 2: step 1 is not needed for step 3, until that checkpoint is damaged."""
    (run_dir / "rollouts" / "step-000001.parquet").unlink()
    gone = "the rollouts of step 1 are gone: there is no run/rollouts/step-000001.parquet"
    done = rlsys("replay", "run", "--step", 2)
    assert (done.code, gone in done.err) == (2, True)
    assert "from the checkpoint of step 2" in rlsys("replay", "run", "--step", 3).out
    (run_dir / "checkpoints" / "step-000002" / "learner" / "learner.json").write_text("{}")
    done = rlsys("replay", "run", "--step", 3)
    assert (done.code, gone in done.err) == (2, True)
    assert "passing over the checkpoint of step 2: learner/learner.json has 2 bytes" in done.out


def test_what_is_no_run_directory(rlsys: Callable, run_dir: Path) -> None:
    assert rlsys("replay", "nowhere", "--step", 1).err == "rlsys: nowhere: no such run directory\n"
    config = run_dir / "config.yaml"
    config.write_text(config.read_text() + "oracle: {}\n")
    done = rlsys("replay", "run", "--step", 1)
    assert done.code == 2
    assert "run/config.yaml is no config of this version of rlsys" in done.err
    assert "oracle: unknown key" in done.err
    config.unlink()
    done = rlsys("replay", "run", "--step", 1)
    assert (done.code, done.err) == (2, "rlsys: run is no run directory: it has no config.yaml\n")


def test_a_folder_to_save_in_that_is_not_there(rlsys: Callable, run_dir: Path) -> None:
    done = rlsys("replay", "run", "--step", 3, "--save", "nowhere/batch.parquet")
    assert (done.code, done.err) == (2, "rlsys: --save: there is no folder nowhere\n")


# ---- figures --------------------------------------------------------------------------------------------------------

LOGGED = {"step": 7, "learner/loss": 0.1, "learner/update_s": 3.0, "policy/ratio": 1.0, "reward/mean": 0.5}


def report(skipped: str | None = None, **metrics: float) -> StepReport:
    figures = {"learner/loss": Mean(0.1, 1.0), "learner/update_s": Sum(9.0), "policy/ratio": Max(1.0)}
    changed = {name.replace("__", "/"): Last(value) for name, value in metrics.items()}
    return StepReport(7, {**figures, **changed}, 10, 9.0, skipped)


def test_equal_figures_leave_out_timings_and_what_is_not_the_learners() -> None:
    figures = compare(logged_values(LOGGED, None), replayed_values(report()))
    assert [figure.name for figure in figures] == ["learner/loss", "policy/ratio"]
    assert all(figure.equal(exact=True) for figure in figures)
    assert verdict({7: figures}, exact=True) == "step 7: 2 of 2 figures are equal to the bit"


def test_one_bit_is_a_difference_unless_the_ranks_are_others() -> None:
    one_bit = math.nextafter(0.1, 1)
    figures = compare(logged_values(LOGGED, None), replayed_values(report(learner__loss=one_bit)))
    assert [figure.equal(exact=True) for figure in figures] == [False, True]
    assert all(figure.equal(exact=False) for figure in figures)
    assert verdict({7: figures}, exact=True) == (
        "step 7: 1 of 2 figures differ, most of all learner/loss: logged 0.1, replayed 0.10000000000000002"
    )


@pytest.mark.parametrize(
    ("logged", "replayed", "equal"),
    [(100.0, 100.0009, True), (100.0, 100.002, False), (0.0, 9e-7, True), (1e-9, -1e-9, True), (0.0, 2e-6, False)],
)
def test_how_near_figures_of_other_ranks_have_to_be(logged: float, replayed: float, equal: bool) -> None:
    [figure] = compare({"learner/loss": logged}, {"learner/loss": replayed})
    assert figure.equal(exact=False) is equal
    assert figure.equal(exact=True) is False


def test_a_figure_that_only_one_side_has_differs() -> None:
    figures = compare({"learner/loss": 1.0}, {"policy/ratio": 1.0})
    assert [(f.name, f.logged, f.replayed) for f in figures] == [("learner/loss", 1.0, None), ("policy/ratio", None, 1)]
    assert not any(figure.equal(exact) for figure in figures for exact in (True, False))
    assert "policy/drift" not in replayed_values(report(policy__drift=math.nan)), "nor is it in the log"


def test_a_skipped_step_has_to_be_skipped_for_the_same_reason() -> None:
    reason = "learner step 6: the gradient is not finite"
    for skipped, equal in ((reason, True), ("something else", False), (None, False)):
        logged, replayed = logged_values({"step": 7}, reason), replayed_values(StepReport(7, {}, 0, 1.0, skipped))
        [figure] = compare(logged, replayed)
        assert (figure.name, figure.equal(exact=True), figure.equal(exact=False)) == ("skipped", equal, equal)


def test_the_largest_difference_is_by_size_and_the_first_step_that_differs_is_named() -> None:
    near = compare({"learner/loss": 1000.0, "learner/x": 0.001}, {"learner/loss": 1001.0, "learner/x": 0.002})
    same, other = compare({"a": 1.0}, {"a": 1.0}), compare({"a": 1.0}, {"a": 2.0})
    assert "most of all learner/x: logged 0.001, replayed 0.002" in verdict({3: near}, exact=True)
    said = verdict({1: same, 2: other, 3: near}, exact=True).splitlines()
    assert said[1] == "it is step 2 that differs first: a: logged 1.0, replayed 2.0"
    assert len(verdict({1: same, 2: same, 3: near}, exact=True).splitlines()) == 1


def test_the_table_has_the_digits_that_tell_two_figures_apart() -> None:
    figures = compare({"learner/loss": 1 / 3, "learner/x": 1 / 3}, {"learner/loss": 1 / 3, "learner/x": 0.25})
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(figures, exact=True))
    rows = [line.split() for line in console.export_text().splitlines()[1:]]
    assert rows == [
        ["learner/loss", "0.333333", "0.333333", "0", "yes"],
        ["learner/x", "0.3333333333333333", "0.25", "-0.0833", "no"],
    ]


# ---- the batch for people -------------------------------------------------------------------------------------------


def group(index: int, lengths: tuple[int, ...], scored: tuple[bool, ...]) -> ScoredGroup:
    prompt = Prompt(f"p{index}", index, np.array([7, 8], np.int32), "?", "sums", None, seed=index)
    rollouts = tuple(
        Rollout(
            *(prompt.id, i, np.arange(n, dtype=np.int32) + 10 * i, np.ones(n, bool), np.full(n, -1.0, np.float32)),
            *((VersionSpan(3, 0, n),), "stop", f"{index}/{i}"),
        )
        for i, n in enumerate(lengths)
    )
    rewards = tuple(Reward("ok", float(i)) if ok else Reward("timeout", math.nan) for i, ok in enumerate(scored))
    return ScoredGroup(RolloutGroup(prompt, rollouts, "g"), rewards)


def test_the_batch_as_a_table() -> None:
    """Two updates, of one group each, the second first; p1#0 has no score and is trained in neither."""
    batch = collate([group(0, (1, 3), (True, True)), group(1, (2, 2), (False, True))])
    advantages = np.where(batch.mask_BT, [[0.5], [1.5], [9.0], [2.5]], 0) + batch.mask_BT * [0, 0, 1]
    whole = build_train_batch(batch, advantages, batch.mask_BT / 7.0, extras={"doubt": advantages * 2})
    before = np.full(batch.mask_BT.shape, -1.5, np.float32)
    trace = Trace(batch, [select_rows(whole, [3]), select_rows(whole, [0, 1])], before, before + 1)
    rows = table_of(trace).to_pylist()
    assert [(row["prompt_id"], row["sample"], row["text"]) for row in rows] == [
        ("p0", 0, "0/0"),
        ("p0", 1, "0/1"),
        ("p1", 0, "1/0"),
        ("p1", 1, "1/1"),
    ]
    assert [row["update"] for row in rows] == [1, 1, None, 0]
    assert [row["advantage"] for row in rows] == pytest.approx([0.5, (1.5 + 1.5 + 2.5) / 3, None, 2.5])
    assert [row["advantages"] for row in rows] == [[0.5], [1.5, 1.5, 2.5], None, [2.5, 2.5]]
    assert [row["extra/doubt"] for row in rows] == [[1.0], [3.0, 3.0, 5.0], None, [5.0, 5.0]]
    assert [row["token_ids"] for row in rows] == [[0], [10, 11, 12], [0, 1], [10, 11]]
    assert [row["trained"] for row in rows] == [[True], [True] * 3, None, [True] * 2]
    assert rows[1]["versions"] == [3, 3, 3]
    assert rows[1]["ratio"] == pytest.approx([math.exp(-0.5)] * 3)
    assert rows[1]["loss_weights"] == pytest.approx([1 / 7] * 3)
    assert rows[1]["logprobs_after"] == [-0.5] * 3
    assert [row["score"] for row in rows[:2]] == [0.0, 1.0]
    assert math.isnan(rows[2]["score"])
    assert {row["reference_logprobs"] for row in rows} == {row["values"] for row in rows} == {None}
