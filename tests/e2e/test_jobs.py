"""Runs as jobs of a cluster of three raylets: submitted, scaled, stopped, gone on with; keys are nowhere to be read."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from rlsys.cli.report import report
from rlsys.ledger.story import read_run

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


def status_of(call: Callable[..., Any], job: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("status", job, "--json").stdout.strip().splitlines()[-1])
    return found


def until(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1.0)  # what is waited for is another process' affair


def test_a_run_is_submitted_scaled_stopped_and_gone_on_with(
    cluster: str, call: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "config.yaml").write_text((CONFIGS / "quickstart.yaml").read_text())
    settings = [*SMALL, "--run.name", "job", "--checkpoint.every", "50", "--driver.max_staleness", "2"]
    said = call("submit", "config.yaml", "--no-wait", *settings, "--run.steps", "5000").stdout
    job = said.split()[1].removesuffix(":")
    assert f"rlsys stop {job} --address {cluster}" in said
    metrics = tmp_path / "runs" / "job" / "metrics.jsonl"
    until(180, lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 2)

    def healthy() -> int:
        workers = status_of(call, job)["workers"]
        return sum(w["name"].startswith("generator") and w["state"] == "healthy" for w in workers)

    assert healthy() == 1
    call("scale", job, "--generators=3")
    until(180, lambda: healthy() == 3)
    call("scale", "job", "--generators=1")
    until(60, lambda: healthy() == 1)
    assert f"job {job}: succeeded" in call("stop", job).stdout
    run = tmp_path / "runs" / "job"
    reached = summary(run)["steps"]
    assert 0 < reached < 5000
    assert (run / "checkpoints" / f"step-{reached:06d}").is_dir(), "it stopped with a checkpoint"
    assert f"step {reached}/5000" in call("logs", "job").stdout

    last = str(reached + 3)
    call("submit", "config.yaml", *settings, "--run.steps", last, "--learner.ranks", "2")
    story = read_run(run)
    assert [step["step"] for step in story.steps] == list(range(1, int(last) + 1))
    assert summary(run)["fates"]["pending"] == 0
    [identity] = (run / "wandb" / "run-id").read_text().split()
    assert {p.name.rpartition("-")[2] for p in (run / "wandb").glob("offline-run-*")} == {identity}

    details = [job.model_dump_json() for job in JobSubmissionClient(cluster).list_jobs()]
    assert len(details) > 2
    assert not any(KEY in text for text in details)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]

    if shutil.which("chromium") and shutil.which("chromedriver"):
        browser = request.getfixturevalue("browser")
        report([run], page := tmp_path / "report.html")
        browser.get(page.as_uri())
        assert [entry["message"] for entry in browser.get_log("browser")] == []
        assert browser.find_elements("css selector", ".sample"), "there are samples to look at"


def test_a_reward_function_finds_no_key(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((CONFIGS / "quickstart.yaml").read_text())
    (tmp_path / "hostile.py").write_text(HOSTILE)
    functions = '[{"name": "look", "kind": "python", "path": "hostile.py:look"}]'
    settings = [*SMALL, "--run.name", "hostile", "--run.steps", "2", "--rewards.functions", functions]
    call("submit", "config.yaml", *settings)
    assert summary(tmp_path / "runs" / "hostile")["fates"]["trained"] == 16


def test_what_is_wrong_is_one_message(call: Callable[..., Any], cluster: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((CONFIGS / "quickstart.yaml").read_text())
    settings = [*SMALL, "--run.name", "wrong"]
    done = call(
        "submit", "config.yaml", *settings, "--learner.ranks", "8", "--resources.roles.learner.cpus", "3", code=2
    )
    assert "the cluster has no room for the run" in done.stdout
    assert "more CPUs are needed" in done.stdout
    assert "Traceback" not in done.stdout
    functions = '[{"name": "look", "kind": "python", "path": "nowhere.py:look"}]'
    done = call("submit", "config.yaml", *settings, "--rewards.functions", functions, code=2)
    assert "nowhere.py" in done.stdout
    assert "Traceback" not in done.stdout
    assert "there is no job nobody" in call("stop", "nobody", code=1).stderr
    outside = call("submit", str(CONFIGS / "quickstart.yaml"), code=2)
    assert "is not in the directory that is sent" in outside.stderr


@pytest.fixture
def old_cluster() -> Iterator[str]:
    """Answers what a client asks first, as a cluster with another version of Ray would."""

    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "4", "ray_version": "2.0.0", "ray_commit": "", "session_name": ""}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refused(tmp_path: Path, address: str) -> str:
    """What `submit` says to an address where it cannot work."""
    (tmp_path / "config.yaml").write_text((CONFIGS / "quickstart.yaml").read_text())
    command = [str(Path(sys.executable).with_name("rlsys")), "submit", "config.yaml", "--address", address]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_an_address_where_nobody_answers(tmp_path: Path) -> None:
    assert "no Ray cluster answers at http://127.0.0.1:9" in refused(tmp_path, "http://127.0.0.1:9")


def test_a_cluster_with_another_version_of_ray(old_cluster: str, tmp_path: Path) -> None:
    said = refused(tmp_path, old_cluster)
    assert f"has Ray 2.0.0, and this is Ray {ray.__version__}: use the same" in said
