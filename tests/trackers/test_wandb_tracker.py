"""The W&B run, offline, read back with W&B's own reader (`wandb leet inspect`)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.util import get_core_path

from rlsys.roles import SampleRow
from rlsys.trackers import TrackerError
from rlsys.trackers.wandb import WandbTracker, resolve_mode

SECRET = "0123456789abcdef" * 2 + "fedcba98"  # the form of a W&B key: 40 hexadecimal digits
CONFIG = {"run": {"name": "n", "seed": 3}, "rollout": {"stop": ["\n"]}}


def sample(step: int, response: str) -> SampleRow:
    return SampleRow(step, f"sums/{step}@0", "1+1=", response, "2", 1.0, f"{step - 1}", "stop")


def records(file: Path) -> list[dict[str, Any]]:
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An offline run of two steps with a key in the environment, then resumed for a third."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.delenv("WANDB_DATA_DIR", raising=False)
        patch.delenv("WANDB_MODE", raising=False)
        for steps in ((1, 2), (3,)):
            tracker = WandbTracker(
                directory, name="n", project="p", mode="offline", config=CONFIG, tags=("t",), deadline_s=30
            )
            if steps == (1, 2):
                tracker.log_eval(0, {"accuracy": 0.125})
            for step in steps:
                tracker.log_step(step, {"reward/mean": step / 8, "staleness/max": 1.0})
                tracker.log_samples(step, [sample(step, f"answer {step}")])
            tracker.finish({"steps": steps[-1]})
        yield directory
        patch.delenv("WANDB_DATA_DIR")


@pytest.fixture(scope="module")
def segments(run_directory: Path) -> list[list[dict[str, Any]]]:
    files = sorted(run_directory.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    return sorted(map(records, files), key=lambda segment: history(segment)[0]["step"])


def test_metrics(segments: list[list[dict[str, Any]]]) -> None:
    rows = [row for segment in segments for row in history(segment)]
    rewards = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert rewards == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row] == [(0, 0.125)]
    metrics = [record["metric"] for record in segments[0] if record["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "step"}.items() <= metrics[1].items()


def test_config_name_and_exit(segments: list[list[dict[str, Any]]]) -> None:
    for segment in segments:
        run = next(record["run"] for record in segment if record["type"] == "run")
        assert CONFIG.items() <= run["config"]["update"].items()
        assert (run["display_name"], run["project"], run["tags"]) == ("n", "p", ["t"])
        assert [record["exit"]["exit_code"] for record in segment if record["type"] == "exit"] == [0]


def test_a_resumed_run_is_the_same_run(run_directory: Path, segments: list[list[dict[str, Any]]]) -> None:
    ids = {record["run"]["run_id"] for segment in segments for record in segment if record["type"] == "run"}
    assert ids == {(run_directory / "wandb" / "run-id").read_text().strip()}


def test_sample_tables_are_incremental(run_directory: Path, segments: list[list[dict[str, Any]]]) -> None:
    tables = [row for row in history(segments[0]) if row.get("samples._type") == "incremental-table-file"]
    assert [row["step"] for row in tables] == [1, 2]
    contents = []
    for row in tables:
        [path] = run_directory.glob(f"wandb/offline-run-*/files/{row['samples.path']}")
        contents.append(json.loads(path.read_text()))
    # each increment holds the new rows only
    assert [[cells[3] for cells in table["data"]] for table in contents] == [["answer 1"], ["answer 2"]]
    assert contents[0]["columns"][:3] == ["step", "prompt_id", "prompt"]


def test_the_key_is_nowhere(run_directory: Path) -> None:
    files = [path for path in run_directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_nothing_is_staged_outside_the_run(run_directory: Path) -> None:
    assert list(run_directory.glob("wandb/data/artifacts/staging/*"))


def test_modes() -> None:
    assert resolve_mode("auto", {}) == "offline"
    assert resolve_mode("auto", {"WANDB_API_KEY": SECRET}) == "online"
    assert resolve_mode("auto", {"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}) == "offline"
    assert resolve_mode("online", {"WANDB_MODE": "offline"}) == "online"
    with pytest.raises(TrackerError, match="WANDB_MODE is 'on'"):
        resolve_mode("auto", {"WANDB_MODE": "on"})


@pytest.mark.slow
def test_online_without_a_server_falls_back_to_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    wandb.teardown()  # so that its service reads the address anew
    tracker = WandbTracker(tmp_path, name="n", project="p", mode="online", config={}, deadline_s=2)
    assert tracker.warning is not None
    assert "offline" in tracker.warning
    tracker.log_step(1, {"a": 1.0})
    tracker.finish({})
    assert "127.0.0.1:9" in tracker.warning
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["a"] for row in history(records(file))] == [1.0]
