"""Each shipped config, end to end at a small size, through every real part."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from .conftest import CONFIGS, REPO, RUN_TIMEOUT_S, SMALL, Rlsys, metrics, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_quickstart_asynchronous_with_updates_in_flight(rlsys: Rlsys, workplace: Path) -> None:
    done = rlsys("train", str(CONFIGS / "quickstart.yaml"), *SMALL, "--run.steps", "6", "--eval.every", "3")
    assert done.returncode == 0, done.stdout
    run = workplace / "runs" / "quickstart"

    result = summary(run)
    assert result["steps"] == 6
    assert result["fates"]["trained"] == 6 * 8
    assert result["fates"]["pending"] == 0
    assert not result["fates"]["dropped"]
    assert result["staleness"]["max"] <= 1
    assert 0 <= result["staleness"]["mean"] <= 1
    assert 0 <= result["eval"]["before"]["accuracy"] <= 1
    assert 0 <= result["eval"]["after"]["accuracy"] <= 1
    assert result["tokens"]["trained"] > 0
    assert result["tokens"]["generated"] >= result["tokens"]["trained"]
    assert result["wall_s"] > 0
    assert result["versions"]["packages"]["ray"]

    steps = [line for line in metrics(run) if "learner/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:  # the sampler and the learner agree, at the start and after every update
        assert line["weights/probe_difference"] <= 1e-4

    files = sorted((run / "rollouts").glob("step-*.parquet"))
    assert len(files) == 6
    assert sum(pq.read_metadata(file).num_rows for file in files) == 6 * 8 * 4

    # The result is an ordinary checkpoint.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "checkpoints" / "step-000006" / "learner" / "hf"
    assert AutoTokenizer.from_pretrained(folder).encode("1+2=")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0

    again = rlsys("inspect", str(run))
    assert again.returncode == 0
    assert "48" in again.stdout


def test_synchronous_runs_are_bit_identical_also_when_stopped_and_resumed(
    rlsys: Rlsys, start: Callable[..., subprocess.Popen[str]], workplace: Path
) -> None:
    """One run straight through; another ended by Ctrl-C, then gone on with. The same weights, to the bit."""
    common = [str(CONFIGS / "quickstart_sync.yaml"), *SMALL, "--run.steps", "6", "--checkpoint.every", "2"]
    straight = rlsys("train", *common, "--run.name", "straight")
    assert straight.returncode == 0, straight.stdout

    process = start("train", *common, "--run.name", "stopped")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if re.search(r"\bstep +3/6\b", line):
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGINT)
            break
    else:
        pytest.fail("".join(said))
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"left behind: {alive}"
    stopped_at = max(
        int(path.name.removeprefix("step-")) for path in (workplace / "runs/stopped/checkpoints").iterdir()
    )
    assert 3 <= stopped_at < 6

    resumed = rlsys("train", *common, "--run.name", "stopped")
    assert resumed.returncode == 0, resumed.stdout

    weights = [
        load_file(workplace / "runs" / name / "checkpoints" / "step-000006" / "learner" / "hf" / "model.safetensors")
        for name in ("straight", "stopped")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
    assert summary(workplace / "runs/stopped")["fates"] == summary(workplace / "runs/straight")["fates"]


def test_ppo_with_a_critic(rlsys: Rlsys, workplace: Path) -> None:
    done = rlsys("train", str(CONFIGS / "quickstart_ppo.yaml"), *SMALL, "--run.steps", "3")
    assert done.returncode == 0, done.stdout
    lines = metrics(workplace / "runs" / "quickstart_ppo")
    assert any(key.startswith("critic/") for line in lines for key in line)


def test_gsm8k_with_a_reference_and_two_learner_ranks(rlsys: Rlsys, workplace: Path) -> None:
    data = REPO.parent / "shared" / "data" / "gsm8k"
    if not data.is_dir():
        pytest.skip("the GSM8K files are not beside the checkout")
    done = rlsys(
        *("train", str(CONFIGS / "gsm8k_grpo_cpu.yaml")),
        *("--prompts.train.path", str(data / "train.jsonl"), "--prompts.eval.path", str(data / "test.jsonl")),
        *("--algorithm.regularize", "[{name: kl, coefficient: 0.01}]"),
        *("--learner.ranks", "2", "--learner.zero_stage", "2"),
    )
    assert done.returncode == 0, done.stdout
    result = summary(workplace / "runs" / "gsm8k_grpo_cpu")
    assert result["steps"] == 3
    assert result["fates"]["trained"] == 3 * 16
