"""`--supervise`: when a driver is started again, and that nothing of it stays behind. Real processes, fake drivers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.cli.rundir import CONFIG, SUPERVISE_LOG, open_run_dir
from rlsys.cli.supervise import Reached, Restarts, Supervisor, reached
from rlsys.config.loading import load_config
from rlsys.config.sizes import SIZES

from .conftest import Done

DRIVER = Path(__file__).with_name("supervised_program.py")
NOTHING = Reached(0, 0)


# ---- the rule -----------------------------------------------------------------------------------------------------


@given(
    limit=st.integers(0, 5),
    deaths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40),
    start=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_only_new_ground_is_progress(limit: int, deaths: list[tuple[int, int]], start: tuple[int, int]) -> None:
    """Against the rule as it is said: given up when there were `limit` restarts since the newest progress."""
    restarts = Restarts(limit, Reached(*start))
    newest = 0  # death at which the newest progress was seen; the start counts as one before all of them
    for i, (step, checkpoint) in enumerate(deaths):
        earlier = [start, *deaths[:i]]
        if all(step > s for s, _ in earlier) or all(checkpoint > c for _, c in earlier):
            newest = i
        pause = restarts.died(Reached(step, checkpoint))
        if i - newest >= limit:
            assert pause is None
            return
        assert pause == 2.0 ** (i - newest)
        assert restarts.total == i + 1


def test_pauses_double_up_to_a_minute() -> None:
    restarts = Restarts(100, NOTHING)
    assert [restarts.died(NOTHING) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert restarts.died(Reached(1, 0)) == 1


def test_how_far_a_run_is(tmp_path: Path) -> None:
    assert reached(tmp_path) == NOTHING
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "loss": 1}\n{"step": 9, "loss": 1}\n{"step": 10, "lo')
    for name in ("step-000004", "step-000008", ".step-000012.tmp", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert reached(tmp_path) == (9, 8)


# ---- the parent ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text("")
    return tmp_path


def supervise(run_dir: Path, *plans: str, limit: int = 3) -> int:
    command = [sys.executable, str(DRIVER), str(run_dir), *plans]
    restarts = Restarts(limit, reached(run_dir), pause_s=0.0)
    return Supervisor([*command, "first"], [*command, "again"], run_dir, restarts).run()


def starts(run_dir: Path) -> list[str]:
    return (run_dir / "starts").read_text().splitlines()


def test_one_that_dies_is_started_again_until_it_is_done(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(run_dir, "step:1,kill", "step:2,exit:1", "exit:0") == 0
    assert starts(run_dir) == ["first", "again", "again"]
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "rlsys: supervise: the driver was killed by SIGKILL at step 1; restart 1 of 3 (1 in a row without progress, "
        "1 in all) in 0 s",
        "rlsys: supervise: the driver ended with exit code 1 at step 2; restart 1 of 3 (1 in a row without progress, "
        "2 in all) in 0 s",
    ]
    log = (run_dir / SUPERVISE_LOG).read_text().splitlines()
    assert [line[20:] for line in log] == [line.removeprefix("rlsys: supervise: ") for line in said]


def test_without_progress_it_is_given_up_with_its_last_words(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(run_dir, "save:7,exit:1", "say:out of luck,kill", limit=2) == 128 + signal.SIGKILL
    assert starts(run_dir) == ["first", "again", "again"]
    assert capfd.readouterr().err.endswith(
        "rlsys: supervise: the driver was killed by SIGKILL at step 0; it is given up after 2 restarts (2 in a row "
        "without progress, 2 in all); its last lines on standard error:\n  out of luck\n"
    )


@pytest.mark.parametrize("code", [2, 130])
def test_what_another_start_does_not_change_ends_it_at_once(run_dir: Path, code: int) -> None:
    assert supervise(run_dir, f"exit:{code}") == code
    assert starts(run_dir) == ["first"]


def test_a_driver_that_died_is_started_again_with_the_sizes_that_it_had(run_dir: Path) -> None:
    (run_dir / SIZES).write_text(json.dumps({"supervisor": "another", "sizes": {"rollout.generators": 9}}))
    assert supervise(run_dir, "exit:1", "scale:2,scale:3,kill", "step:1,exit:1", "exit:0") == 0
    resized = "again --rollout.generators 3"
    assert starts(run_dir) == ["first", "again", resized, resized]
    assert supervise(run_dir, "exit:0") == 0
    assert starts(run_dir)[4:] == ["first"], "a command that is given anew has the sizes of its config"


def test_what_a_driver_leaves_behind_is_ended(run_dir: Path) -> None:
    assert supervise(run_dir, "leave,kill", limit=0) == 128 + signal.SIGKILL
    pid = int((run_dir / "left").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(run_dir: Path) -> Iterator[Start]:
    """A supervisor in a process of its own."""
    processes = []

    def begin(*plans: str, pause_s: float = 0.0) -> subprocess.Popen[str]:
        command = [sys.executable, str(DRIVER), str(run_dir), *plans]
        program = (
            "import sys; from pathlib import Path; from rlsys.cli.supervise import Supervisor, Restarts, Reached\n"
            f"restarts = Restarts(3, Reached(0, 0), {pause_s})\n"
            f"code = Supervisor({command}, {command}, Path({str(run_dir)!r}), restarts).run()\n"
            "assert not {'ray', 'torch', 'vllm'} & set(sys.modules), 'the parent is to be small'\n"
            "sys.exit(code)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def waiting(process: subprocess.Popen[str]) -> int:
    """Wait for the fake driver to wait; returns its pid."""
    assert process.stdout is not None
    word, pid = process.stdout.readline().split()
    assert word == "waiting"
    return int(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_and_end_it(start: Start, run_dir: Path, number: signal.Signals) -> None:
    process = start("wait,wait,exit:1")
    for _ in range(2):
        waiting(process)
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{number.name}\n"
    assert process.communicate() == ("", "")
    assert process.returncode == 1
    assert len(starts(run_dir)) == 1


def test_a_signal_ends_the_pause(start: Start, run_dir: Path) -> None:
    process = start("exit:1", pause_s=3600)
    assert process.stderr is not None
    assert "in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    assert len(starts(run_dir)) == 1


def test_the_driver_does_not_outlive_the_parent(start: Start) -> None:
    process = start("wait")
    driver = psutil.Process(waiting(process))
    process.kill()
    _, alive = psutil.wait_procs([driver], timeout=20)
    assert not alive


# ---- the command --------------------------------------------------------------------------------------------------


def test_mistakes_in_the_config_are_told_as_ever(rlsys: Callable[..., Done]) -> None:
    done = rlsys("train", "missing.yaml", "--supervise")
    assert done.code == 2
    assert "missing.yaml" in done.err


def test_its_log_survives_a_start_from_nothing(tmp_path: Path) -> None:
    text = "{model: {path: x}, prompts: {train: {kind: sums}}, rewards: {functions: [{name: sums, kind: sums}]}}"
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(tmp_path / "c.yaml", ["--run.dir", str(tmp_path / "run")])
    with open_run_dir(config) as run_dir:
        (run_dir / SUPERVISE_LOG).write_text("restarted\n")
        (run_dir / "ledger.sqlite").write_text("begun")
        (run_dir / SIZES).write_text("{}")
    with open_run_dir(config):
        assert (run_dir / SUPERVISE_LOG).read_text() == "restarted\n"
        assert (run_dir / SIZES).exists()
        assert not (run_dir / "ledger.sqlite").exists()
