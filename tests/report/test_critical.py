"""Critical paths of simulated runs whose slow stage is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rlsys.errors import DataError, RunDirError
from rlsys.report import critical
from rlsys.report.critical import Analysis, analyse
from rlsys.sim.roles import Timing

QUICK = Timing((8, 8), 160.0, 0.05, 0.05, 0.1, 0.02, 0.02)  # 0.05 s of sampling
SLOW = {
    "sampling": replace(QUICK, tokens_per_s=1.0),
    "reward": replace(QUICK, score_s=8.0),
    "reference": replace(QUICK, reference_s=8.0),
    "gradient": replace(QUICK, step_s=8.0),
    "publish": replace(QUICK, publish_s=8.0),
    "weights": replace(QUICK, update_s=8.0),
}
WAITS_FOR = {"sampling": "generators", "reward": "rewarders", "reference": "reference", "weights": "weights"}


def run_of(make_run: Callable, path: Path, timing: Timing, bound: int, steps: int = 6, **options: object) -> Path:
    return make_run(
        *(path, 0, steps, {"timing": timing, "with_reference": True, **options}),
        driver={"prompts_per_step": 4, "max_staleness": bound},
        eval={"before": False, "after": False},
        rollout={"stall_timeout_s": 600.0},
        weights={"timeout_s": 600.0},
    )


@pytest.mark.parametrize("bound", [0, 1])
@pytest.mark.parametrize("slow", SLOW)
def test_the_slow_stage_bounds_the_steps(make_run: Callable, tmp_path: Path, slow: str, bound: int) -> None:
    found = analyse(run_of(make_run, tmp_path / "run", SLOW[slow], bound))
    assert [path.step for path in found.paths] == [1, 2, 3, 4, 5, 6]
    seconds = {stage: sum(path.by_stage().get(stage, 0.0) for path in found.paths) for stage in critical.STAGES}
    assert max(seconds, key=seconds.__getitem__) == slow
    assert seconds[slow] > 0.8 * sum(seconds.values())
    roles = {role.name: role for role in found.roles}
    learner = roles["learner"]
    if slow in WAITS_FOR:
        assert max(learner.waited, key=learner.waited.__getitem__) == WAITS_FOR[slow]
        assert learner.busy < 0.2 * learner.seconds
    else:
        assert learner.busy > 0.8 * learner.seconds
        for name in ("generator-0", "rewarder-0", "reference"):
            assert max(roles[name].waited, key=roles[name].waited.__getitem__) == "learner"


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_the_parts_add_up_to_the_step(make_run: Callable, tmp_path: Path, bound: int) -> None:
    run = run_of(make_run, tmp_path / "run", Timing(), bound)
    times = {
        row["step"]: row["time/step_s"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    found = analyse(run)
    for path in found.paths:
        for before, after in zip(path.parts, path.parts[1:], strict=False):
            assert before.end == after.start
        if path.step > 1:
            assert path.seconds == pytest.approx(times[path.step], abs=1e-4)
    for role in found.roles:
        assert role.busy + sum(role.waited.values()) == pytest.approx(role.seconds)
        assert 0 <= role.busy <= role.seconds + 1e-9
        assert min(role.waited.values()) >= -1e-9


def test_one_step_names_the_prompt_and_the_workers(make_run: Callable, tmp_path: Path) -> None:
    """Rewards take long: the path of the step goes through the one that took longest."""
    run = run_of(make_run, tmp_path / "run", SLOW["reward"], bound=0)
    [path] = analyse(run, 3).paths
    assert path.bound == "reward"
    stages = [part.stage for part in path.parts]
    order = ["publish", "weights", "sampling", "reward", "reference", "gradient"]
    assert [stage for stage in stages if stage in order] == order
    [reward] = [part for part in path.parts if part.stage == "reward"]
    assert reward.who == f"rewarder-0, {path.prompt}"
    [sampling] = [part for part in path.parts if part.stage == "sampling"]
    assert sampling.who.startswith("generator-")
    assert sampling.seconds == pytest.approx(0.05, abs=1e-3)


def test_a_straggler_is_waited_for_by_the_other_generator(make_run: Callable, tmp_path: Path) -> None:
    def slow_down(simulation: object) -> None:
        simulation.generators[0].slow_down(50)  # type: ignore[attr-defined]

    run = run_of(make_run, tmp_path / "run", QUICK, 0, act=slow_down)
    roles = {role.name: role for role in analyse(run).roles}
    assert roles["generator-0"].busy > 0.9 * roles["generator-0"].seconds
    assert roles["generator-1"].waited["generators"] > 0.6 * roles["generator-1"].seconds


def test_the_batch_is_told_from_the_gradient_where_the_learner_says_so(make_run: Callable, tmp_path: Path) -> None:
    run = run_of(make_run, tmp_path / "run", SLOW["gradient"], bound=0)
    whole = analyse(run, 2).paths[0].by_stage()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | {"learner/update_s": 0.01}) + "\n" for row in rows))
    split = analyse(run, 2).paths[0].by_stage()
    assert split["gradient"] == pytest.approx(0.01, abs=1e-5)
    assert split["batch"] + split["gradient"] == pytest.approx(whole["gradient"], abs=1e-5)
    assert "batch" not in whole


def test_without_a_reference_there_is_none_to_wait_for(make_run: Callable, tmp_path: Path) -> None:
    found = analyse(run_of(make_run, tmp_path / "run", QUICK, 0, with_reference=False))
    assert "reference" not in {role.name for role in found.roles}
    assert all("reference" not in path.by_stage() for path in found.paths)


def test_the_newest_steps_and_the_prompts_that_can_be_followed(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(make_run, tmp_path / "run", QUICK, 1)
    monkeypatch.setattr(critical, "NEWEST", 2)
    found: Analysis = analyse(run)
    assert [path.step for path in found.paths] == [5, 6]
    assert set(found.traced) == {f"sim/{i}" for i in range(16, 24)}


def test_what_is_not_there(make_run: Callable, tmp_path: Path) -> None:
    run = run_of(make_run, tmp_path / "run", QUICK, 0, steps=2)
    with pytest.raises(DataError, match="no step 3: its steps are 1 to 2"):
        analyse(run, 3)
    with pytest.raises(RunDirError, match="nowhere: no such run directory"):
        analyse(tmp_path / "nowhere")
    empty = Path(shutil.copytree(run, tmp_path / "empty"))
    (empty / "timeline.json").write_text("[\n]\n")
    with pytest.raises(DataError, match="no step yet"):
        analyse(empty)
    (empty / "timeline.json").unlink()
    with pytest.raises(RunDirError, match=r"trackers\.timeline is false"):
        analyse(empty)
