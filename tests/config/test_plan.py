"""The plan's arithmetic, by hand, and the arithmetic that cannot work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.loading import load_config
from rlsys.config.models import Config, TinyModelConfig
from rlsys.config.plan import Facts, Machine, ModelSize, make_plan, tiny_size
from rlsys.errors import ConfigError

MINIMAL = """\
model: {tiny: {}, max_length: 256}
prompts: {train: {kind: sums}, eval: {kind: sums, seed: 1}}
rewards: {functions: [{name: right, kind: sums}]}
"""
BOX = Machine(cores=2, memory_gib=24.0, gpus=0)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return lambda *overrides: load_config(path, overrides)


def test_the_arithmetic_of_a_run(config: Any) -> None:
    plan = make_plan(
        config(
            "--driver.prompts_per_step=48",
            "--rollout.samples_per_prompt=8",
            "--rollout.max_new_tokens=100",
            "--driver.max_staleness=2",
            "--learner.ranks=2",
            "--learner.micro_batch_tokens=1000",
            "--run.steps=60",
        ),
        Facts(epochs=2, minibatches=4, train_rows=480, longest_prompt=20),
        BOX,
    )
    assert plan.rollouts_per_step == 48 * 8
    assert plan.groups_in_flight == 3 * 48
    assert plan.row_tokens == 120
    assert plan.response_tokens_per_step == 384 * 100
    assert plan.tokens_per_step == 384 * 120
    assert plan.updates_per_step == 8
    assert plan.updates == 480
    assert plan.rows_per_update == 96
    # 48 rows for each rank, 8 of 120 tokens in 1000: 6 micro-batches
    assert (plan.rows_per_micro_batch, plan.micro_batches_per_rank) == (8, 6)
    assert plan.steps_per_epoch == 10
    assert plan.epochs_of_data == 6
    assert plan.rollouts == 60 * 384
    assert plan.problems == ()


def test_limits(config: Any) -> None:
    plan = make_plan(
        config("--driver.max_groups_in_flight=70", "--learner.micro_batch_tokens=64"), Facts(train_rows=None), BOX
    )
    assert plan.groups_in_flight == 70  # and not 128
    assert plan.row_tokens == 256  # no prompt is known: the whole context
    assert (plan.rows_per_micro_batch, plan.micro_batches_per_rank) == (1, 512)  # a longer row has one to itself
    assert plan.steps_per_epoch is None


def test_size_of_a_tiny_model_is_the_size_of_the_built_one() -> None:
    from rlsys.models.tiny import build_model

    config = TinyModelConfig(hidden_size=32, intermediate_size=80, layers=3, heads=4, key_value_heads=2, head_dim=16)
    model = build_model(config, max_length=64, seed=0)
    size = tiny_size(config, model.config.vocab_size)
    assert size.parameters == sum(p.numel() for p in model.parameters())


def test_memory_of_the_learner_is_cut_by_zero(config: Any) -> None:
    """A billion parameters in float32, by hand: 4 bytes weight, 4 gradient, 8 optimizer state."""
    facts = Facts(longest_prompt=10, model=ModelSize(10**9, layers=0, hidden_size=0, vocabulary=0))

    def learner(*overrides: str) -> float:
        plan = make_plan(config("--learner.ranks=2", *overrides), facts, BOX)
        return next(role.memory_gib for role in plan.roles if role.name == "learner rank")

    whole = learner("--learner.zero_stage=0")
    saved = [(whole - learner(f"--learner.zero_stage={stage}")) * 1024**3 / 1e9 for stage in (1, 2, 3)]
    assert saved == pytest.approx([4, 6, 8])
    alone = learner("--learner.zero_stage=0", "--learner.ranks=1")
    # and 12 bytes for the copy of weights and moments that a checkpoint is written from, once for all ranks
    assert (alone - whole) * 1024**3 / 1e9 == pytest.approx(12 - 12 / 2)


@pytest.mark.parametrize(
    ("overrides", "facts", "message"),
    [
        (["--rollout.max_new_tokens=256"], {}, r"rollout\.max_new_tokens \(256\) .* model\.max_length \(256\)"),
        (
            ["--driver.prompts_per_step=10"],
            {"minibatches": 4},
            r"driver\.prompts_per_step \(10\) .* algorithm\.minibatches \(4\)",
        ),
        (["--rollout.generators=3"], {}, r"rollout\.generators \(3\) is more than the 2 cores"),
        (["--learner.ranks=3"], {}, r"learner\.ranks \(3\) is more than the 2 cores"),
        (
            ["--learner.ranks=2", "--driver.prompts_per_step=1", "--rollout.samples_per_prompt=1"],
            {},
            r"learner\.ranks \(2\) is more than the 1 rollouts",
        ),
        (["--rewards.workers=500"], {}, r"GiB of memory are needed \(.*500 x reward worker"),
        (["--rollout.engine.kv_cache_gib=40"], {}, r"rollout\.engine\.kv_cache_gib"),
        (["--model.dtype=bfloat16"], {}, r"learner\.zero_stage: 0 keeps no float32 master weights"),
        (["--weights.engine=nccl"], {}, r"weights\.engine: nccl needs profile: gpu"),
        (
            ["--weights.engine=nccl", "--profile=gpu", "--reference.update=every"],
            {},
            r"reference\.update: every needs weights\.engine: object_store",
        ),
        (
            ["--weights.kv_cache=share", "--driver.max_staleness=0"],
            {},
            r"kv_cache: share .*max_staleness: 0 rules out",
        ),
        (["--rollout.engine.tensor_parallel=2"], {}, r"rollout\.engine\.tensor_parallel needs profile: gpu"),
        (["--learner.offload=true", "--learner.zero_stage=2"], {}, r"learner\.offload needs profile: gpu"),
        (["--model.path=somewhere"], {}, r"model\.path or model\.tiny: both are given"),
        (["--model.tiny=null"], {}, r"model\.path or model\.tiny: neither is given"),
        (["--prompts.train={kind: jsonl, path: a}"], {}, r"warm_start fits the model to worked sums, but .* jsonl"),
        (["--model.tiny.head_dim=16"], {}, r"model\.tiny\.head_dim \(16\) must be one that vLLM has on a CPU: 32, 64"),
        (["--model.tiny.heads=3"], {}, r"model\.tiny\.heads \(3\) must be a multiple"),
        (["--profile=gpu", "--rollout.generators=2"], {}, r"profile gpu: 3 GPUs are needed .* this machine has 0"),
        (
            ["--run.storage=file:///x", "--trackers.wandb.log_model=true"],
            {},
            r"trackers\.wandb\.log_model .* with run\.storage",
        ),
        (["--prompts.eval=null", "--eval.every=5"], {}, r"eval\.every is 5, but prompts\.eval is null"),
        (
            ["--driver.autoscale.generators=[2, 2]"],
            {},
            r"rollout\.generators \(1\) is not within driver\.autoscale\.generators \[2, 2\]",
        ),
        (
            ["--driver.autoscale={reward_workers: [1, 3]}", "--rewards.workers=4"],
            {},
            r"rewards\.workers \(4\) is not within driver\.autoscale\.reward_workers \[1, 3\]",
        ),
        (["--driver.autoscale.generators=[1, 3]"], {}, r"autoscale\.generators goes up to 3, more than the 2 cores"),
    ],
)
def test_arithmetic_that_cannot_work(config: Any, overrides: list[str], facts: dict[str, int], message: str) -> None:
    plan = make_plan(config(*overrides), Facts(**facts), BOX)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        plan.check()
    assert re.search(message, str(caught.value))


def test_a_cluster_is_not_this_machine(config: Any) -> None:
    given: Config = config("--resources.ray_address=auto", "--profile=gpu", "--rollout.generators=64")
    make_plan(given, Facts(), BOX).check()
