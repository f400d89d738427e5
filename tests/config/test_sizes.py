"""Sizes that a run has been given: put into a config, kept for a supervisor, and no reason to be another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config.identity import same_run
from rlsys.config.loading import load_config
from rlsys.config.models import Config, Sizes
from rlsys.config.sizes import SIZES, SUPERVISOR, keep_sizes, kept_sizes, resized


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {tiny: {}}\nprompts: {train: {kind: sums}}\nrewards: {functions: [{name: right, kind: sums}]}\n"
    )
    return path


def shape(config: Config) -> tuple[int, int, int, int]:
    return config.rollout.generators, config.rewards.workers, config.learner.ranks, config.learner.zero_stage


def test_what_is_not_given_stays_and_it_is_the_same_run(path: Path) -> None:
    config = load_config(path, ["--rollout.generators=2", "--learner.zero_stage=1"])
    other = resized(config, Sizes(generators=5, learner_ranks=4))
    assert shape(config) == (2, 1, 1, 1)
    assert shape(other) == (5, 1, 4, 1)
    assert same_run(config, other) == []
    assert resized(other, Sizes(generators=2, learner_ranks=1)) == config, "and nothing else is changed"


def test_a_supervisor_gets_back_what_was_kept_for_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = path.parent
    assert kept_sizes(run_dir, "a") == []
    monkeypatch.setenv(SUPERVISOR, "a")
    keep_sizes(run_dir, Sizes(generators=1, reward_workers=1, learner_ranks=1, zero_stage=0))
    keep_sizes(run_dir, Sizes(generators=5, reward_workers=3, learner_ranks=4, zero_stage=2))
    assert shape(load_config(path, ["--rollout.generators=2", *kept_sizes(run_dir, "a")])) == (5, 3, 4, 2)
    assert kept_sizes(run_dir, "b") == [], "another command of a person has the sizes of its config"
    assert [p.name for p in run_dir.iterdir() if p != path] == [SIZES]


def test_without_a_supervisor_they_are_nobodys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUPERVISOR, raising=False)
    keep_sizes(path.parent, Sizes(generators=5))
    assert kept_sizes(path.parent, "a") == []
