"""Each shipped config, end to end at a small size, through every real part."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from .conftest import CONFIGS, REPO, RUN_TIMEOUT_S, SMALL, Rlsys, metrics, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def quickstart(rlsys: Rlsys, workplace: Path) -> Path:
    """Its run directory, after 6 steps."""
    arguments = ("--run.steps", "6", "--eval.every", "3", "--checkpoint.every", "2")
    done = rlsys("train", str(CONFIGS / "quickstart.yaml"), *SMALL, *arguments)
    assert done.returncode == 0, done.stdout
    return workplace / "runs" / "quickstart"


def test_quickstart_asynchronous_with_updates_in_flight(quickstart: Path, rlsys: Rlsys) -> None:
    run = quickstart
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


def test_a_step_of_the_quickstart_is_replayed_to_the_bit(quickstart: Path, rlsys: Rlsys, workplace: Path) -> None:
    before = {path: path.read_bytes() for path in quickstart.rglob("*") if path.is_file()}
    done = rlsys("replay", str(quickstart), "--step", "5", "--save", "batch.parquet")
    assert done.returncode == 0, done.stdout
    assert "from the checkpoint of step 4" in done.stdout
    assert re.search(r"step 5: (\d+) of \1 figures are equal to the bit", done.stdout)
    for figure in ("advantages/mean", "learner/loss", "learner/grad_norm", "reference/kl_k3"):
        assert figure in done.stdout
    assert {path: path.read_bytes() for path in before} == before

    rows = pq.read_table(workplace / "batch.parquet").to_pylist()
    assert len(rows) == 8 * 4
    [logged] = [line for line in metrics(quickstart) if line["step"] == 5]
    advantages = [
        a for row in rows if row["trained"] for a, t in zip(row["advantages"], row["trained"], strict=True) if t
    ]
    assert np.mean(advantages) == pytest.approx(logged["advantages/mean"], abs=1e-6)
    own = [  # sampled by the weights that the learner had, so the log-probs are the same but for the implementation
        abs(learner - sampler)
        for row in rows
        for learner, sampler, version in zip(row["logprobs"], row["behavior_logprobs"], row["versions"], strict=True)
        if version == 4
    ]
    assert max(own, default=0.0) <= 1e-4


def test_one_changed_bit_of_one_sampled_logprob_is_found(quickstart: Path, rlsys: Rlsys, workplace: Path) -> None:
    """Without checkpoints, so that the initial model is where it starts."""
    changed = shutil.copytree(quickstart, workplace / "changed")
    shutil.rmtree(changed / "checkpoints")
    path = changed / "rollouts" / "step-000003.parquet"
    table = pq.read_table(path)
    field = table.schema.field("behavior_logprobs")
    column = table.column(field.name).to_pylist()
    place = table.column("fate").to_pylist().index("trained")
    logprobs = np.array(column[place], np.float32)
    logprobs.view(np.uint8)[0] ^= 0x80  # of the bits that weigh least
    column[place] = logprobs.tolist()
    pq.write_table(
        table.set_column(table.schema.get_field_index(field.name), field, pa.array(column, field.type)), path
    )

    done = rlsys("replay", str(changed), "--step", "3")
    assert done.returncode == 1, done.stdout
    assert "from the initial model, by way of steps 1 to 2" in done.stdout
    assert re.search(r"step 3: \d+ of \d+ figures differ, most of all \w+/\w+: logged ", done.stdout)
    assert "differs first" not in done.stdout


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

    replayed = rlsys("replay", "runs/gsm8k_grpo_cpu", "--step", "3")
    assert replayed.returncode == 0, replayed.stdout
    assert "step 3 of runs/gsm8k_grpo_cpu, 2 ranks: " in replayed.stdout
    assert "figures are equal to the bit" in replayed.stdout
