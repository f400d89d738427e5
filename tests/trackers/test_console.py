"""What the person in front of the terminal reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlsys.trackers.console import ConsoleTracker, bound_by, duration, waiting

STEP = {
    "reward/mean": 0.4375,
    "staleness/mean": 0.5,
    "staleness/max": 1.0,
    "tokens/generated_per_s": 8123.4,
    "tokens/trained_per_s": 7000.0,
    "time/step_s": 2.0,
    "wait/learner_for_rollouts_s": 0.5,
    "wait/generators_for_learner_s": 0.02,
    "bound/generation": 0.25,
    "bound/reward": 0.0,
    "bound/learner": 0.7,
}
SUMMARY: dict[str, Any] = {
    "eval": {"before": {"accuracy": 0.25}, "after": {"accuracy": 0.5}},
    "steps": 60,
    "wall_s": 185.0,
    "tokens": {"generated": 123456, "trained": 120000},
    "staleness": {"mean": 0.75, "max": 1},
    "fates": {"trained": 640, "dropped": {"zero variance": 3}, "pending": 64},
    "versions": {},
}


def text_of(mode: Any, tmp_path: Path, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=300)
    with ConsoleTracker("quick", tmp_path, steps=60, mode=mode, console=console) as tracker:
        tracker.note("starting workers")
        tracker.log_eval(0, {"accuracy": 0.25, "prompts": 512.0})
        for step in range(1, 31):
            tracker.log_step(step, STEP)
        (tmp_path / "metrics.jsonl").touch()
        tracker.finish(SUMMARY)
    return out.getvalue()


def test_plain_lines(tmp_path: Path) -> None:
    lines = text_of("auto", tmp_path, terminal=False).splitlines()
    assert lines[0] == "starting workers"
    assert lines[1] == "held-out after step 0: accuracy 25.0% (512 problems)"
    assert lines[31] == (
        "step 30/60  reward 0.438  held-out 25.0% (step 0)  staleness 0.50 (max 1)  "
        "tokens/s 8,123 generated, 7,000 trained  waiting learner for rollouts 25%  bound by learner 70%  left 1m00s"
    )


def test_live_panel(tmp_path: Path) -> None:
    text = text_of("auto", tmp_path, terminal=True)
    for part in ("step 30/60", "0.438", "8,123 generated", "learner for rollouts 25%", "1m00s"):
        assert part in text


@pytest.mark.parametrize("mode", ["live", "plain"])
def test_the_final_table(tmp_path: Path, mode: str) -> None:
    text = text_of(mode, tmp_path, terminal=mode == "live")
    tail = text[text.index("60 steps in 3m05s") :]
    for part in ("25.0%", "50.0%", "+25.0 points", "123,456 generated", "3 dropped (zero variance)", "metrics.jsonl"):
        assert part in tail
    assert "timeline.json" not in tail  # there is none


def test_none_says_nothing_but_warnings(tmp_path: Path) -> None:
    assert text_of("none", tmp_path, terminal=False) == ""
    out = io.StringIO()
    ConsoleTracker("quick", tmp_path, 1, "none", Console(file=out)).warn("W&B is gone")
    assert out.getvalue() == "warning: W&B is gone\n"


def test_a_run_without_evaluations_or_staleness_has_a_table(tmp_path: Path) -> None:
    out = io.StringIO()
    tracker = ConsoleTracker("quick", tmp_path, 1, "plain", Console(file=out, width=80))
    tracker.finish(SUMMARY | {"eval": {"before": None, "after": None}, "staleness": {"mean": None, "max": None}})
    assert "accuracy" not in out.getvalue()


@pytest.mark.parametrize(
    ("learner", "generators", "said"),
    [
        (0.0, 0.0, "nobody"),
        (0.1, 0.0, "nobody"),
        (0.0, 1.0, "generators for learner 50%"),
        (0.5, 1.5, "learner for rollouts 25%, generators for learner 75%"),
    ],
)
def test_who_waits_for_whom(learner: float, generators: float, said: str) -> None:
    metrics = {
        "time/step_s": 2.0,
        "wait/learner_for_rollouts_s": learner,
        "wait/generators_for_learner_s": generators,
    }
    assert waiting(metrics) == said


@pytest.mark.parametrize(
    ("generation", "reward", "learner", "said"),
    [(0.5, 0.2, 0.3, "generation 50%"), (0.0, 0.9, 0.1, "reward 90%"), (0.01, 0.02, 0.03, None)],
)
def test_the_stage_that_a_step_is_bound_by(generation: float, reward: float, learner: float, said: str | None) -> None:
    metrics = {"bound/generation": generation, "bound/reward": reward, "bound/learner": learner, "time/step_s": 1.0}
    assert bound_by(metrics) == said
    assert bound_by({"time/step_s": 1.0}) is None


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 185, 3600, 7620)] == ["0s", "59s", "1m00s", "3m05s", "1h00m", "2h07m"]
