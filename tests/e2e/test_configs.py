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

from rlsys.ledger.story import read_run

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


SYNCHRONOUS = [str(CONFIGS / "quickstart_sync.yaml"), *SMALL, "--checkpoint.every", "2"]
SYNCHRONOUS += ["--run.steps", "8", "--driver.silence_timeout_s", "20"]


@pytest.fixture(scope="module")
def straight(rlsys: Rlsys, workplace: Path) -> Path:
    """The run directory of a synchronous run that nobody disturbed."""
    done = rlsys("train", *SYNCHRONOUS, "--run.name", "straight")
    assert done.returncode == 0, done.stdout
    return workplace / "runs" / "straight"


def assert_same_end(run: Path, other: Path) -> None:
    """The same weights, to the bit, and the same fates."""
    file = Path("checkpoints", "step-000008", "learner", "hf", "model.safetensors")
    ours, theirs = load_file(run / file), load_file(other / file)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)
    assert summary(run)["fates"] == summary(other)["fates"]


def test_a_synchronous_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    straight: Path, rlsys: Rlsys, start: Callable[..., subprocess.Popen[str]], workplace: Path
) -> None:
    process = start("train", *SYNCHRONOUS, "--run.name", "stopped")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if re.search(r"\bstep +3/8\b", line):
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGINT)
            break
    else:
        pytest.fail("".join(said))
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"left behind: {alive}"
    stopped = workplace / "runs" / "stopped"
    stopped_at = max(int(path.name.removeprefix("step-")) for path in (stopped / "checkpoints").glob("step-*"))
    assert 3 <= stopped_at < 8

    resumed = rlsys("train", *SYNCHRONOUS, "--run.name", "stopped")
    assert resumed.returncode == 0, resumed.stdout
    assert_same_end(stopped, straight)


def line_of(process: psutil.Process) -> str:
    """Its command line; nothing where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_synchronous_run_whose_roles_are_killed_ends_with_the_same_bits(
    straight: Path, start: Callable[..., subprocess.Popen[str]], workplace: Path
) -> None:
    """Every role once, in the middle of what it does; the reference is stopped instead, and found by its silence."""
    victims = {
        1: ("ray::GeneratorActor", signal.SIGKILL),
        2: ("ray::LearnerActor", signal.SIGKILL),
        3: ("ray::RewardActor", signal.SIGKILL),
        5: ("ray::ReferenceActor", signal.SIGSTOP),
        6: ("VLLM::EngineCore", signal.SIGKILL),
    }
    process = start("train", *SYNCHRONOUS, "--run.name", "killed")
    assert process.stdout is not None
    said, hit = [], []
    for line in process.stdout:
        said.append(line)
        found = re.search(r"\bstep +(\d)/8\b", line)
        if found and int(found[1]) in victims:
            title, number = victims[int(found[1])]
            for child in psutil.Process(process.pid).children(recursive=True):
                if line_of(child).startswith(title):
                    child.send_signal(number)
                    hit.append(title)
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, "".join(said)
    assert hit == [title for title, _ in victims.values()]
    killed = workplace / "runs" / "killed"
    lost = [note.detail["worker"] for note in read_run(killed).notes if note.event == "worker lost"]
    assert lost == ["generator-0", "learner", "rewarder-0", "reference", "generator-0"], "".join(said)
    assert_same_end(killed, straight)


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
