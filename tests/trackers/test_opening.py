"""Which trackers a config opens, and what they are given."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import wandb
from rich.console import Console

from rlsys.sim.drive import sim_config
from rlsys.trackers.console import ConsoleTracker
from rlsys.trackers.fanout import Trackers, open_trackers
from rlsys.trackers.repository import git_state

from .test_console import SUMMARY
from .test_wandb_tracker import records


def opened(run_dir: Path, resources: Mapping[str, Any] = {}, **options: Any) -> tuple[Trackers, str]:
    """The trackers, and what was said about them; without W&B, unless that is asked for."""
    said = io.StringIO()
    console = ConsoleTracker("n", run_dir, 1, "none", Console(file=said, width=300))
    trackers = {"wandb": {"mode": "disabled"}, "timeline": False, **options}
    return open_trackers(sim_config(trackers=trackers, resources=resources), run_dir, console), said.getvalue()


@pytest.mark.parametrize(
    ("prometheus", "address", "expected"),
    [("auto", None, False), ("auto", "auto", True), (True, None, True), (False, "auto", False)],
)
def test_prometheus_where_there_is_a_cluster(
    tmp_path: Path, prometheus: Any, address: str | None, expected: bool
) -> None:
    trackers, said = opened(tmp_path, {"ray_address": address}, prometheus=prometheus)
    assert ("prometheus" in trackers.names) is expected
    assert said == ""


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensorboard" not in opened(tmp_path)[0].names
    trackers, _ = opened(tmp_path, tensorboard=True)
    trackers.log_step(1, {"reward/mean": 0.5})
    assert list(tmp_path.glob("tensorboard/events.*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers, said = opened(tmp_path, tensorboard=True)
    assert list(trackers.names) == ["jsonl", "console"]
    assert "tracker tensorboard failed and is left out; the run goes on" in said


def test_wandb_is_given_the_config_and_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    trackers, _ = opened(tmp_path, wandb={"mode": "offline", "group": "seeds", "job_type": "seed-3"})
    trackers.finish(SUMMARY)
    wandb.teardown()  # its service closes the file a little later than a run is finished
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    run = next(record["run"] for record in records(file) if record["type"] == "run")
    given = run["config"]["update"]
    assert (run["run_group"], run["job_type"]) == ("seeds", "seed-3")
    assert given["driver"]["prompts_per_step"] == 4
    assert given["git"] == git_state(Path.cwd())
    assert "diff" not in json.dumps(given["git"])
