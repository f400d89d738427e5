"""A run as a job of a cluster of three raylets, and what its reward functions see of the cluster's keys."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from .conftest import CONFIGS, RUN_TIMEOUT_S, SMALL, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KEY = "never-to-be-seen-4711"
NODE = {"num_cpus": 3, "object_store_memory": 150 * 2**20}

# Looks wherever a reward function can look without being another user: what it finds is in the reward's detail.
HOSTILE = """
import os
from pathlib import Path

def look(response):
    seen = [name for name, value in os.environ.items() if value.startswith("never")]
    for process in ("self", os.getppid()):
        if b"never" in Path(f"/proc/{process}/environ").read_bytes():
            seen.append(f"the environment of {process}")
    if seen:
        raise RuntimeError(f"found {seen}")
    return float(len(response) % 2)
"""


def free_port() -> int:
    """For the part of a node that takes jobs: several nodes are on this machine, and maybe another cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three raylets on this machine with a dashboard, whose environment has keys; gives the dashboard's address."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "HF_TOKEN", "JUDGE_API_KEY"):
            patch.setenv(name, KEY)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {**NODE, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(**NODE, dashboard_agent_listen_port=free_port())
            yield f"http://{cluster.head_node.webui_url}"
        finally:
            cluster.shutdown()


@pytest.fixture
def call(cluster: str, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A command of `rlsys` against the cluster, whose code has to be 0."""

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("rlsys")), *arguments, "--address", cluster]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def test_a_reward_function_finds_no_key(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((CONFIGS / "quickstart.yaml").read_text())
    (tmp_path / "hostile.py").write_text(HOSTILE)
    functions = '[{"name": "look", "kind": "python", "path": "hostile.py:look"}]'
    settings = [*SMALL, "--run.name", "hostile", "--run.steps", "2", "--rewards.functions", functions]
    call("submit", "config.yaml", *settings)
    assert summary(tmp_path / "runs" / "hostile")["fates"]["trained"] == 16


def test_an_address_where_nobody_answers(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((CONFIGS / "quickstart.yaml").read_text())
    command = [str(Path(sys.executable).with_name("rlsys")), "submit", "config.yaml", "--address", "http://127.0.0.1:9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    assert done.returncode == 1
    assert "no Ray cluster answers at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
