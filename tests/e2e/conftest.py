"""Runs of the real command, small: one process with Ray, vLLM, DeepSpeed and W&B (offline) below it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlsys.metrics.catalog import find

REPO = Path(__file__).parents[2]
CONFIGS = REPO / "configs"
RUN_TIMEOUT_S = 280

# A model and batches that take a second a step, on any config that extends the quickstart.
SMALL = [
    *("--model.tiny.hidden_size", "64", "--model.tiny.intermediate_size", "128", "--model.tiny.layers", "2"),
    *("--model.tiny.warm_start.steps", "30"),
    *("--driver.prompts_per_step", "8", "--rollout.samples_per_prompt", "4"),
    *("--eval.prompts", "32", "--eval.every_prompts", "16", "--trackers.wandb.table_every", "2"),
]

Rlsys = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this session live; built models are shared."""
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="session")
def start(workplace: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `rlsys ARGUMENTS` in a session of its own."""

    def begin(*arguments: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("rlsys")), *arguments],
            cwd=workplace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return begin


@pytest.fixture(scope="session")
def rlsys(start: Callable[..., subprocess.Popen[str]]) -> Rlsys:
    """Run `rlsys ARGUMENTS` to its end."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        process = start(*arguments)
        try:
            output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
            for pid in family:
                os.kill(pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, output)

    return run


def summary(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "summary.json").read_text()))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, and a check that every metric in them is defined."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [name for row in rows for name in row if name != "step" and find(name) is None] == []
    return rows
