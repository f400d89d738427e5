"""The Slurm script, run here: `srun` and `scontrol` are scripts that do on this machine what those do elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import psutil
import pytest

from .conftest import PROFILES

SRUN = """
echo "srun $*" >> "$ASKED"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# What a driver does when it is told to end, so far as the script can see it.
DRIVER = """
echo "rlsys $*, RAY_ADDRESS $RAY_ADDRESS" >> "$ASKED"
echo "rlsys has a token that $(stat -c %a "$RAY_AUTH_TOKEN_PATH") may read" >> "$ASKED"
[ -z "${LOOK:-}" ] || "$PYTHON" -c "$LOOK" >> "$ASKED"
trap 'echo "ended with a checkpoint" >> "$ASKED"; exit 0' TERM
echo driving >> "$ASKED"
[ -n "${CODE:-}" ] && exit "$CODE"
while true; do sleep 0.1; done
"""
FAKES = {
    "srun": SRUN,
    "scontrol": 'echo "scontrol $*" >> "$ASKED"; printf "node-0\\nnode-1\\n"',
    "hostname": "echo 127.0.0.1",
    "rlsys": DRIVER,
}
NO_RAY = {"ray": "exec sleep 600", "python": "exit 0"}  # a cluster that is there at once
SECRET = "never-to-be-seen-4711"


class Job(NamedTuple):
    process: subprocess.Popen[str]
    asked: Path

    def until(self, text: str, timeout_s: float) -> None:
        """Until somebody has been asked for something that has this in it."""
        deadline = time.monotonic() + timeout_s
        while text not in (self.asked.read_text() if self.asked.exists() else ""):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"no {text!r} in {self.asked.read_text()}"
            time.sleep(0.1)  # what is waited for is another process' affair

    def family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def end(self, timeout_s: float = 60.0) -> str:
        return self.process.communicate(timeout=timeout_s)[0]


def token_of(job: Job) -> Path:
    """Where the script keeps what Ray lets the job's own processes in by."""
    return job.asked.with_name(".ray-token-4711")


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], alive


@pytest.fixture
def sbatch(render: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """`sbatch(fakes, wait_s=60, CODE="7")` starts the script as the first node of two would; the rest are variables."""
    jobs: list[Job] = []

    def start(fakes: dict[str, str], wait_s: int = 60, **variables: str) -> Job:
        folder = tmp_path / "fakes"
        folder.mkdir()
        for name, text in fakes.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(0o755)
        values = render.read_values(PROFILES["cpu"])
        slurm = values.slurm.model_copy(update={"cpus": 1, "bin": "fakes", "wait_s": wait_s})
        script = tmp_path / "slurm.sh"
        script.write_text(render.slurm_script(values.model_copy(update={"slurm": slurm})))
        environment = {
            **os.environ,
            **{
                "SLURM_JOB_NODELIST": "node-[0-1]",
                "SLURM_JOB_ID": "4711",
                "ASKED": str(tmp_path / "asked"),
                "PYTHON": sys.executable,
            },
            **{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_API_KEY": SECRET},
            **variables,
        }
        process = subprocess.Popen(
            ["bash", str(script)],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        jobs.append(Job(process, tmp_path / "asked"))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            for process in job.family():
                process.kill()


def test_it_starts_ray_on_every_node_and_ends_with_the_code_of_the_run(sbatch: Callable[..., Job]) -> None:
    job = sbatch({**FAKES, **NO_RAY}, CODE="7", RLSYS_RAY_PORT="7000")
    assert "2 nodes at 127.0.0.1:7000" in job.end()
    assert job.process.returncode == 7
    asked = job.asked.read_text()
    assert "scontrol show hostnames node-[0-1]" in asked
    started = sorted(line for line in asked.splitlines() if "ray start" in line)
    assert (
        "--nodelist=node-0 --nodes=1 --ntasks=1 ray start --head --node-ip-address=127.0.0.1 --port=7000" in started[0]
    )
    assert "--nodelist=node-1 --nodes=1 --ntasks=1 ray start --address=127.0.0.1:7000 --num-cpus=1" in started[1]
    assert "rlsys train configs/quickstart.yaml --supervise --resources.ray_address auto" in asked
    assert "RAY_ADDRESS 127.0.0.1:7000" in asked
    assert SECRET not in asked
    assert "rlsys has a token that 600 may read" in asked
    assert not token_of(job).exists()


def test_a_signal_before_the_end_is_for_the_driver_and_all_is_gone_afterwards(sbatch: Callable[..., Job]) -> None:
    job = sbatch({**FAKES, **NO_RAY})
    job.until("driving", 30)
    family = job.family()
    assert len(family) >= 4  # the script, two nodes, the driver
    job.process.send_signal(signal.SIGTERM)
    job.end()
    assert job.process.returncode == 0
    assert "ended with a checkpoint" in job.asked.read_text()
    assert_gone(family)


def test_a_signal_while_the_cluster_is_being_started_ends_it(sbatch: Callable[..., Job]) -> None:
    job = sbatch({**FAKES, **NO_RAY, "python": "exit 1"})
    job.until("ray start --address", 30)
    family = job.family()
    job.process.send_signal(signal.SIGTERM)
    job.end()
    assert job.process.returncode == 143
    assert "rlsys train" not in job.asked.read_text()
    assert_gone(family)


def test_a_cluster_that_does_not_come_together_is_given_up(sbatch: Callable[..., Job]) -> None:
    job = sbatch({**FAKES, **NO_RAY, "python": "exit 1"}, wait_s=3)
    job.until("ray start --address", 30)
    family = job.family()
    assert "2 nodes have not joined 127.0.0.1:6379 within 3 s" in job.end()
    assert job.process.returncode == 1
    assert "rlsys train" not in job.asked.read_text()
    assert_gone(family)


def test_a_node_whose_ray_ends_is_told_at_once(sbatch: Callable[..., Job]) -> None:
    job = sbatch({**FAKES, "ray": "exit 1", "python": "exit 1"}, wait_s=600)
    assert "a node's Ray ended while the cluster was being started" in job.end()
    assert job.process.returncode == 1


def test_without_slurm_it_says_how_it_is_started(sbatch: Callable[..., Job]) -> None:
    job = sbatch({**FAKES, **NO_RAY}, SLURM_JOB_NODELIST="")
    assert "start this with sbatch" in job.end()
    assert job.process.returncode != 0


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """For Ray, whose sockets have at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


LOOK = """
import ray
ray.init("auto", log_to_driver=False, logging_level="ERROR")
nodes = [node for node in ray.nodes() if node["Alive"]]
print("nodes", len(nodes), "CPUs", sum(node["Resources"].get("CPU", 0) for node in nodes))
"""


@pytest.mark.slow
def test_with_a_real_ray(sbatch: Callable[..., Job], short_dir: Path) -> None:
    """Two raylets join; everything that was started is gone when the script has ended."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    job = sbatch(FAKES, wait_s=120, LOOK=LOOK, RLSYS_RAY_PORT=str(port), RAY_TMPDIR=str(short_dir))
    job.until("driving", 180)
    assert "nodes 2 CPUs 2" in job.asked.read_text()
    family = job.family()
    names = {process.name() for process in family}
    assert {"gcs_server", "raylet"} <= names
    secret = token_of(job).read_text()
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert not [process for process in family if secret in command_line(process)]
    job.process.send_signal(signal.SIGTERM)
    said = job.end(120)
    assert job.process.returncode == 0, said
    assert "ended with a checkpoint" in job.asked.read_text()
    assert_gone(family)
    left = [process for process in psutil.process_iter() if str(short_dir) in command_line(process)]
    assert not left


def command_line(process: psutil.Process) -> str:
    """Nothing where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
