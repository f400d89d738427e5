"""JSONL and timeline: whole files after a crash at any byte, each step once after a resume."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.trackers import TrackerError
from rlsys.trackers.fanout import Trackers
from rlsys.trackers.jsonl import JsonlTracker, read_rows
from rlsys.trackers.timeline import TimelineTracker


def rows_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_has_one_line_a_step_and_one_an_evaluation(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path)
    tracker.log_eval(0, {"accuracy": 0.25})
    for step in (1, 2):
        tracker.log_step(step, {"reward/mean": step / 4})
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.25},
        {"step": 2, "reward/mean": 0.5},
    ]
    assert rows_of(tmp_path / "evals.jsonl") == [{"step": 0, "accuracy": 0.25}]


@pytest.mark.parametrize("told", [True, False], ids=["resumed() is called", "steps just come again"])
def test_steps_done_again_replace_their_earlier_lines(tmp_path: Path, told: bool) -> None:
    first = JsonlTracker(tmp_path)
    for step in range(1, 6):
        first.log_step(step, {"try": 1})
    first.log_eval(4, {"accuracy": 0.5})
    second = JsonlTracker(tmp_path)
    if told:
        second.resumed(3)
        assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        assert rows_of(tmp_path / "evals.jsonl") == []
    second.log_step(4, {"try": 2})
    assert [(row["step"], row["try"]) for row in rows_of(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
    ]


@pytest.mark.parametrize("cut", range(1, 21))
def test_a_half_written_line_is_taken_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(tmp_path)
    tracker.log_step(1, {"a": 1.5})
    tracker.log_step(2, {"a": 2.5})
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_rows(path) == [{"step": 1, "a": 1.5}]
    JsonlTracker(tmp_path).log_step(2, {"a": 3.5})
    assert rows_of(path) == [{"step": 1, "a": 1.5}, {"step": 2, "a": 3.5}]


def test_a_figure_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match=r"metrics\.jsonl: step 3: loss is not finite"):
        JsonlTracker(tmp_path).log_step(3, {"fine": 1.0, "loss": float("nan")})


def test_timeline_is_whole_json_after_every_flush(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    tracker = TimelineTracker(tmp_path)
    assert json.loads(path.read_text()) == []
    before, now = time.time(), time.monotonic()
    tracker.event("generate", now, now + 0.5, "generator-0")
    tracker.event("step", now + 0.5, now + 0.75, "learner")
    tracker.log_step(1, {})
    events = json.loads(path.read_text())
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [(lanes[e["tid"]], e["name"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [("generator-0", "generate", 500_000), ("learner", "step", 250_000)]
    assert events[1]["ts"] / 1e6 == pytest.approx(before, abs=0.1)

    # another process goes on with the file, with the same lanes
    again = TimelineTracker(tmp_path)
    again.event("step", now + 1, now + 2, "learner")
    again.finish({})
    events = json.loads(path.read_text())
    assert [e["tid"] for e in events if e["name"] == "step"] == [1, 1]
    assert sum(e["ph"] == "M" for e in events) == 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_timeline_survives_a_crash_at_any_byte(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "timeline.json"
    path.unlink(missing_ok=True)
    tracker = TimelineTracker(tmp_path)
    for i in range(5):
        tracker.event(f"e{i}", i, i + 1, "lane")
        tracker.flush()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    again = TimelineTracker(tmp_path)
    again.event("after", 9, 10, "lane")
    again.flush()
    names = [e["name"] for e in json.loads(path.read_text()) if e["ph"] == "X"]
    ends = [re.search(rf'"e{i}".*?}}'.encode(), whole).end() for i in range(5)]  # type: ignore[union-attr]
    assert names == [f"e{i}" for i in range(5) if ends[i] <= cut] + ["after"]


def test_timeline_is_sampled_by_kind_and_lane(tmp_path: Path) -> None:
    tracker = TimelineTracker(tmp_path, dense=10)
    for i in range(40):
        tracker.event("often", i, i + 1, "a")
        if i < 10:
            tracker.event("seldom", i, i + 1, "a")
    tracker.flush()
    events = [e for e in json.loads((tmp_path / "timeline.json").read_text()) if e["ph"] == "X"]
    # the first 10, then of 10..19 every second, of 20..29 every fourth, of 30..39 every eighth
    kept = [*range(10), 10, 12, 14, 16, 18, 20, 24, 28, 32]
    assert sum(e["name"] == "seldom" for e in events) == 10
    often = [e["ts"] for e in events if e["name"] == "often"]
    assert [round((ts - often[0]) / 1e6) for ts in often] == kept


def test_the_way_of_a_prompt_shares_its_id(tmp_path: Path) -> None:
    tracker = TimelineTracker(tmp_path)
    tracker.event("sampling", 1.0, 3.0, "generator-0", "sums/1@0")
    tracker.event("reward", 3.0, 3.5, "rewarder-0", "sums/1@0")
    tracker.flush()
    events = json.loads((tmp_path / "timeline.json").read_text())
    stages = [e for e in events if e["ph"] in "be"]
    assert [(e["ph"], e["name"]) for e in stages] == [
        *(("b", "sampling"), ("e", "sampling"), ("b", "reward"), ("e", "reward")),
    ]
    assert {(e["id"], e["cat"]) for e in stages} == {("sums/1@0", "prompt")}
    assert stages[1]["ts"] - stages[0]["ts"] == pytest.approx(2e6, abs=1)
    assert stages[2]["args"] == {"prompt": "sums/1@0", "worker": "rewarder-0"}


def test_a_prompt_is_kept_with_all_of_its_stages_or_none(tmp_path: Path) -> None:
    tracker = TimelineTracker(tmp_path, dense=10)
    for stage in ("sampling", "reward"):
        for i in range(40):
            tracker.event(stage, i, i + 1, "lane", f"p{i}")
    tracker.flush()
    events = json.loads((tmp_path / "timeline.json").read_text())
    kept = [*range(10), 10, 12, 14, 16, 18, 20, 24, 28, 32]
    for stage in ("sampling", "reward"):
        assert [e["id"] for e in events if e["ph"] == "b" and e["name"] == stage] == [f"p{i}" for i in kept]


class Breaking(JsonlTracker):
    def __init__(self, directory: Path, error: Exception) -> None:
        super().__init__(directory)
        self.error = error
        self.calls = 0

    def log_step(self, step: int, metrics: object) -> None:
        self.calls += 1
        raise self.error


def test_a_failing_tracker_is_named_once_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    breaking = Breaking(tmp_path, OSError(28, "No space left on device"))
    (tmp_path / "good").mkdir()
    trackers = Trackers({"wandb": breaking, "jsonl": JsonlTracker(tmp_path / "good")}, said.append)
    for step in (1, 2, 3):
        trackers.log_step(step, {})
    trackers.finish({})
    assert [row["step"] for row in rows_of(tmp_path / "good" / "metrics.jsonl")] == [1, 2, 3]
    assert breaking.calls == 1
    assert len(said) == 1
    assert "tracker wandb failed" in said[0]
    assert "No space left" in said[0]
    assert list(trackers.failed) == ["wandb"]


def test_a_mistake_in_a_tracker_is_not_swallowed(tmp_path: Path) -> None:
    trackers = Trackers({"x": Breaking(tmp_path, TypeError("a bug"))}, lambda _: None)
    with pytest.raises(TypeError, match="a bug"):
        trackers.log_step(1, {})
