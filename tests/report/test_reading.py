"""What is read of a run directory: whole, going on, damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.errors import RunDirError
from rlsys.report.page import render
from rlsys.report.reading import read_runs
from rlsys.report.samples import KINDS

RESPONSES = ("rollouts/step-000002.parquet", "rollouts/evaluations/step-000002.parquet")


@pytest.fixture(scope="module")
def whole(make_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_whole_run(run_dir: Path) -> None:
    [run] = read_runs([run_dir])
    assert run.problems == []
    assert (run.label, run.name, run.state) == ("run", "small", "ended after step 4")
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4]
    assert [row["step"] for row in run.evals] == [0, 2, 4]
    assert run.fates == {"trained": 16, "dropped": {}, "pending": 0}
    assert {step: sum(counts.values()) for step, counts in run.lengths.items()} == dict.fromkeys((1, 2, 3, 4), 8)
    assert (run.samples.read, run.samples.files) == (4, 4)
    assert (run.evaluations.read, run.evaluations.files, len(run.evaluations.shown)) == (3, 3, 3)


def test_a_run_that_is_going_on(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-9])  # the last line is being written
    [run] = read_runs([run_dir])
    assert run.problems == []
    assert run.last_step == 3
    assert run.state.startswith("at step 3 of 4: going on, or ended without a summary, written ")


def test_a_run_that_went_on_after_it_was_stopped_has_an_old_summary(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3]))
    (run_dir / "summary.json").write_text('{"steps": 3}')
    assert read_runs([run_dir])[0].state == "stopped at step 3 of 4"
    (run_dir / "summary.json").write_text('{"steps": 2}')
    assert read_runs([run_dir])[0].state.startswith("at step 3 of 4: going on")


def broken(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, broken], ids=["missing", "damaged"])
@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "evals.jsonl", "summary.json", "ledger.sqlite", *RESPONSES],
)
def test_what_is_missing_or_damaged_is_named_and_the_rest_is_shown(
    run_dir: Path, name: str, damage: Callable[[Path], None]
) -> None:
    if damage is broken and name == "ledger.sqlite":
        (run_dir / name).write_bytes(b"no ledger at all" * 1000)
    else:
        damage(run_dir / name)
    [run] = read_runs([run_dir])
    # what a run has only later, or not at all, is not missed
    quiet = damage is Path.unlink and name in ("evals.jsonl", "summary.json", *RESPONSES)
    assert [str(run_dir / name) in problem for problem in run.problems] == ([] if quiet else [True])
    page = render([run])
    assert ("Missing or damaged" in page) == (not quiet)
    assert "Tokens generated" in page or name == "metrics.jsonl"
    assert "drawn" in page or name == "ledger.sqlite"
    assert run.samples.shown
    assert len(run.evaluations.shown) == 3


def test_nothing_is_left_in_the_run_directory(run_dir: Path) -> None:
    before = sorted(run_dir.rglob("*"))
    render(read_runs([run_dir]))
    assert sorted(run_dir.rglob("*")) == before


def test_what_is_no_run_directory(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(RunDirError, match="nowhere: no such run directory"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirError, match=r"empty is no run directory: it has none of config\.yaml"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(RunDirError, match="given twice"):
        read_runs([run_dir, tmp_path / "empty" / ".." / "run"])


def test_a_run_that_was_only_just_begun(tmp_path: Path, whole: Path) -> None:
    """Its config is there, and nothing else."""
    (tmp_path / "new").mkdir()
    shutil.copy(whole / "config.yaml", tmp_path / "new")
    [run] = read_runs([tmp_path / "new"])
    assert run.state == "at step 0 of 4: going on, or ended without a summary"
    page = render([run])
    assert "metrics.jsonl is missing" in page
    assert all(not run.samples.kinds[kind] for kind in KINDS)
