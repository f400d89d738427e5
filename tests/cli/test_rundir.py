"""Run directories: one process at a time, and nothing left of a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.cli.rundir import open_run_dir
from rlsys.config.loading import load_config
from rlsys.config.models import Config
from rlsys.errors import DataError, EngineError, RunDirError

PROGRAM = """
import sys
from rlsys.cli.rundir import open_run_dir
from rlsys.config.loading import load_config
with open_run_dir(load_config(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "model: {tiny: {}}\nprompts: {train: {kind: sums}}\nrewards: {functions: [{name: right, kind: sums}]}\n"
    )
    return load_config("c.yaml")


def test_the_resolved_config_is_kept(config: Config) -> None:
    with open_run_dir(config) as path:
        assert path == Path("runs/run")
        assert load_config(path / "config.yaml") == config
    with open_run_dir(config):  # the same run goes on
        pass


def test_a_directory_in_use_is_refused_until_its_process_is_gone(config: Config) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "c.yaml"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunDirError, match="in use by another rlsys process"), open_run_dir(config):
            pass
    finally:
        other.kill()
        other.wait(timeout=30)
        for pipe in (other.stdin, other.stdout):
            assert pipe is not None
            pipe.close()
    with open_run_dir(config):
        pass


def fail_in_run_dir(config: Config, file: str, error: BaseException) -> None:
    with open_run_dir(config) as path:
        (path / file).touch()
        raise error


@pytest.mark.parametrize("error", [DataError("bad row"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_mistake(config: Config, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_in_run_dir(config, "rlsys.log", error)
    assert not Path("runs").exists()


def test_what_was_there_before_stays(config: Config) -> None:
    with open_run_dir(config):
        pass
    with pytest.raises(DataError):
        fail_in_run_dir(config, "rlsys.log", DataError("bad row"))
    assert Path("runs/run/config.yaml").is_file()


def test_what_a_failed_start_left_is_begun_anew_with_any_config(config: Config) -> None:
    with pytest.raises(RuntimeError):
        fail_in_run_dir(config, "ledger.sqlite", RuntimeError("no memory"))
    assert Path("runs/run/ledger.sqlite").exists()  # kept, to look at
    other = load_config("c.yaml", ["--run.seed", "7"])
    with open_run_dir(other) as path:
        assert not (path / "ledger.sqlite").exists()
        assert load_config(path / "config.yaml") == other


def test_a_run_that_has_trained_stays(config: Config) -> None:
    with pytest.raises(DataError):
        fail_in_run_dir(config, "metrics.jsonl", DataError("a bad row, much later"))
    assert Path("runs/run/metrics.jsonl").is_file()


def test_a_failure_that_is_no_mistake_leaves_its_traces(config: Config) -> None:
    with pytest.raises(EngineError):
        fail_in_run_dir(config, "rlsys.log", EngineError("generator-0 died"))
    assert Path("runs/run/rlsys.log").is_file()
