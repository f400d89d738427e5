"""Runs that differ in seeds only are one group; the others are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.report.groups import differences, group_runs
from rlsys.report.reading import read_runs


@pytest.fixture(scope="module")
def runs(make_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one config, and two runs of others."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / "a" / "0", seed=0),
        make_run(folder / "a" / "1", seed=1, run={"dir": "elsewhere"}),
        make_run(folder / "b" / "0", driver={"prompts_per_step": 4, "max_staleness": 0}),
        make_run(folder / "c" / "0", run={"name": "other"}, learner={"optimizer": {"learning_rate": 0.5}}),
    ]


def test_groups_labels_and_differences(runs: list[Path]) -> None:
    read = read_runs(runs)
    assert [run.label for run in read] == ["a/0", "a/1", "b/0", "c/0"]
    groups = group_runs(read)
    assert [[run.label for run in group.runs] for group in groups] == [["a/0", "a/1"], ["b/0"], ["c/0"]]
    # the name of the config where it tells them apart, else the folders
    assert [group.label for group in groups] == ["a/0, a/1", "b/0", "other"]
    assert [dict(group.seeds) for group in groups] == [{"run.seed": [0, 1]}, {}, {}]
    found = {row.key: list(row.values) for row in differences(groups)}
    assert found == {
        "driver.max_staleness": ["1", "0", "1"],
        "learner.optimizer.learning_rate": [*2 * [found["learner.optimizer.learning_rate"][0]], "0.5"],
    }


def test_one_group_has_no_differences(runs: list[Path]) -> None:
    assert differences(group_runs(read_runs(runs[:2]))) == []


def test_a_run_without_a_config_is_a_group_of_its_own(runs: list[Path], tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    groups = group_runs(read_runs([tmp_path / "x", runs[0], tmp_path / "y"]))
    assert [group.label for group in groups] == ["x", "small", "y"]
    assert differences(groups) == []
