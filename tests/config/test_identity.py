"""Whose run directory it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys.config.identity import MAY_DIFFER, check_same_run, config_hash, same_run
from rlsys.config.loading import all_keys, dump_config, load_config
from rlsys.errors import RunDirError


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {tiny: {}}\nprompts: {train: {kind: sums}}\nrewards: {functions: [{name: right, kind: sums}]}\n"
    )
    return path


def test_same_run_lists_only_keys_that_matter(config_file: Path) -> None:
    config = load_config(config_file)
    longer = load_config(config_file, ["--run.steps=7", "--trackers.console=plain", "--eval.timeout_s=9"])
    other = load_config(config_file, ["--run.seed=1", "--prompts.train.largest=5", "--rollout.stop=[a]"])
    assert same_run(config, longer) == []
    assert config_hash(config) == config_hash(longer) != config_hash(other)
    assert same_run(config, other) == ["prompts.train.largest", "rollout.stop", "rollout.stop.0", "run.seed"]


def test_every_key_that_may_differ_exists() -> None:
    assert set(MAY_DIFFER) <= set(all_keys())


def test_a_directory_of_another_config_is_refused(tmp_path: Path, config_file: Path) -> None:
    written = tmp_path / "config.yaml"
    dump_config(load_config(config_file), written)
    check_same_run(load_config(config_file, ["--run.steps=7"]), written)
    with pytest.raises(RunDirError, match=r"run\.seed: 0 there, 3 now") as caught:
        check_same_run(load_config(config_file, ["--run.seed=3"]), written)
    assert "directory of its own" in str(caught.value)
