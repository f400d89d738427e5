"""Run directories: one process at a time, and nothing left of a mistake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.cli.rundir import archive_of, checkpoints_of, open_run_dir
from rlsys.config.loading import load_config
from rlsys.config.models import Config
from rlsys.driver.checkpoints import Checkpoints, Manifest
from rlsys.errors import DataError, EngineError, RunDirError, StorageError
from rlsys.storage import deliver

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


# ---- a working copy of a run in a storage ---------------------------------------------------------------------------


@pytest.fixture
def stored(config: Config, tmp_path: Path) -> Config:
    return load_config("c.yaml", ["--run.storage", f"file://{tmp_path}/storage/{{name}}"])


def train_a_little(config: Config) -> None:
    """A checkpoint of step 2, and what a run leaves beside it."""
    with open_run_dir(config) as path:
        archive = archive_of(config, path)
        assert archive is not None
        (path / "metrics.jsonl").write_text('{"step": 2}\n')
        checkpoints = Checkpoints(path / "checkpoints", shelf=archive)
        place = checkpoints.begin(2)
        files = deliver(place, lambda folder: (folder / "learner.json").write_text("{}"))
        checkpoints.commit(
            Manifest(2, 0, 0, [], 0, "", {}, {}), {f"learner/{name}": found for name, found in files.items()}
        )


def test_a_run_goes_on_where_there_is_nothing(stored: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train_a_little(stored)
    shutil.rmtree("runs")
    with open_run_dir(stored) as path:
        assert (path / "metrics.jsonl").read_text() == '{"step": 2}\n'
        assert load_config(path / "config.yaml") == stored
        assert "is a working copy of file://" in capsys.readouterr().err
    assert checkpoints_of(path).versions() == [2]
    with open_run_dir(stored):  # and now it is there
        assert capsys.readouterr().err == ""


def test_a_storage_that_has_the_run_of_another_config(stored: Config) -> None:
    train_a_little(stored)
    shutil.rmtree("runs")
    other = stored.model_copy(update={"run": stored.run.model_copy(update={"seed": 7})})
    with pytest.raises(RunDirError, match=r"another config:\n  run.seed: 0 there, 7 now"), open_run_dir(other):
        pass
    never = stored.model_copy(update={"run": stored.run.model_copy(update={"resume": "never"})})
    shutil.rmtree("runs", ignore_errors=True)
    with pytest.raises(RunDirError, match=r"holds a run already, and run.resume is never"), open_run_dir(never):
        pass
    assert not Path("runs").exists()


def test_a_working_copy_is_nothing_without_its_storage(stored: Config, config: Config) -> None:
    train_a_little(stored)
    with pytest.raises(RunDirError, match=r"checkpoints are in a storage: give run.storage as it was"):
        open_run_dir(config).__enter__()


def test_a_run_without_a_storage_is_not_taken_for_a_copy(stored: Config, config: Config) -> None:
    with open_run_dir(config) as path:
        (path / "metrics.jsonl").touch()
    with pytest.raises(RunDirError, match="holds a run that is not in file://"), open_run_dir(stored):
        pass
    assert (path / "metrics.jsonl").exists()


def test_a_second_process_on_this_machine_does_not_take_over(stored: Config) -> None:
    train_a_little(stored)
    with open_run_dir(stored) as path:
        archive = archive_of(stored, path)
        with pytest.raises(RunDirError, match="in use by another rlsys process"), open_run_dir(stored):
            pass
        assert archive is not None
        archive.push()


def test_a_failed_start_in_a_storage_is_begun_anew(stored: Config) -> None:
    with pytest.raises(RuntimeError):
        fail_in_run_dir(stored, "ledger.sqlite", RuntimeError("no memory"))
    with open_run_dir(stored) as path:
        assert not (path / "ledger.sqlite").exists()
        assert archive_of(stored, path) is not None


def test_a_storage_that_cannot_be_had(stored: Config, tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("a file")
    with pytest.raises(StorageError, match=r"file://.*storage/run"), open_run_dir(stored):
        pass
