"""`rlsys report` and `rlsys timeline` as commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.config.loading import dump_config
from rlsys.ledger.ledger import Ledger
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.trackers.jsonl import JsonlTracker
from rlsys.trackers.timeline import TimelineTracker


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "small"

    def act(simulation: Simulation) -> None:
        simulation.driver.tracker = simulation.driver.recorder.tracker = JsonlTracker(path)

    path.mkdir()
    config = sim_config(steps=2, run={"steps": 2, "name": "small"})
    dump_config(config, path / "config.yaml")
    simulate(config, path, act)
    return path


def test_a_page_is_written(rlsys: Callable, whole: Path, tmp_path: Path) -> None:
    done = rlsys("report", whole)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("report.html: 1 run, ")
    assert "<title>rlsys report: small</title>" in (tmp_path / "report.html").read_text()
    again = shutil.copytree(whole, tmp_path / "again")
    done = rlsys("report", whole, again, "--out", tmp_path / "two.html")
    assert done.code == 0
    assert "2 runs that differ in nothing" in (tmp_path / "two.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "report.html", "two.html"]


def test_what_is_damaged_is_said(rlsys: Callable, whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "metrics.jsonl").unlink()
    done = rlsys("report", run)
    assert done.code == 0
    assert done.err.startswith(f"rlsys: run: {run / 'metrics.jsonl'} is missing")
    assert (tmp_path / "report.html").is_file()


def test_what_cannot_be_done_is_said(rlsys: Callable, whole: Path, tmp_path: Path) -> None:
    done = rlsys("report", tmp_path / "nowhere")
    assert (done.code, "nowhere: no such run directory" in done.err) == (2, True)
    done = rlsys("report", whole, "--out", tmp_path / "no" / "folder.html")
    assert (done.code, "--out: " in done.err, "cannot be written" in done.err) == (2, True, True)
    assert rlsys("report").code == 2


def test_timeline_says_what_bounded_the_steps(rlsys: Callable, tmp_path: Path) -> None:
    """A learner that takes a minute a step; the times are put into the files by hand."""
    path = tmp_path / "run"
    path.mkdir()
    ledger = Ledger(path / "ledger.sqlite")
    ledger.close()
    tracker = TimelineTracker(path)
    for step in (1, 2, 3):
        tracker.event(f"step {step}", 100.0 * step, 100.0 * step + 60, "learner")
        tracker.event(f"publish {step}", 100.0 * step + 60, 100.0 * step + 70, "learner")
    tracker.finish({})
    (path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "wait/learner_for_rollouts_s": 0.0}}\n' for i in (1, 2, 3))
    )
    done = rlsys("timeline", path)
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert f"{path}: steps 1 to 3, 260.00 s" in lines  # of the first step only itself is known
    assert any(line.startswith("gradient 180.000 69% 3 of 3 █") for line in lines)
    assert any(line.startswith("publish 20.000 8% █") for line in lines)
    assert "learner 77% 23%" in lines
    done = rlsys("timeline", path, "--step", "2")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "bound by: gradient" in lines
    assert "publish 0.000 10.000 10% learner" in lines
    assert "gradient 40.000 60.000 60% learner" in lines
    done = rlsys("timeline", path, "--step", "7")
    assert (done.code, "no step 7: its steps are 1 to 3" in done.err) == (2, True)
