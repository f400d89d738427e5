"""A checkpoint resumes bit for bit, though it is written while later steps are trained, and loads on another number of
ranks and with another ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.errors import DiskFullError, LearnerError

pytestmark = pytest.mark.slow
OPTIMIZER = {"learning_rate": 0.01, "weight_decay": 0.1, "warmup_steps": 3}


def trained(world: Any, config: Any, model: Path, make_batch: Any, seeds: range) -> None:
    world.run("build", config=config, model_path=model)
    train(world, make_batch, seeds)


def train(world: Any, make_batch: Any, seeds: range) -> None:
    for seed in seeds:
        assert world.run("update", batch=make_batch(rows=6, seed=seed))[0][1] is None
        world.run("advance")


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 2), (2, 3)])
def test_resumes_bit_for_bit(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    world = worlds[ranks]
    config = make_config(zero_stage=stage, micro_batch_tokens=60, optimizer=OPTIMIZER)
    trained(world, config, tiny_model, make_batch, range(2))
    memory = {"advantage": {"baseline": 0.1 + 0.2}}
    world.run("snapshot", memory=memory)
    drawn = world.run("draw")
    train(world, make_batch, range(2, 4))
    world.run("write", directory=tmp_path, tokenizer=tiny_model)
    uninterrupted = world.run("state")

    world.run("build", config=config, model_path=tiny_model)
    assert world.run("load", directory=tmp_path) == [memory] * ranks
    assert world.run("attribute", name="version") == [2] * ranks
    assert world.run("draw")[0] == drawn[0]
    train(world, make_batch, range(2, 4))
    for got, wanted in zip(world.run("state"), uninterrupted, strict=True):
        assert not [name for name in wanted if not np.array_equal(got[name], wanted[name])]


@pytest.mark.parametrize(("source", "target"), [((1, 0), (2, 3)), ((2, 3), (1, 0)), ((2, 2), (2, 0)), ((1, 0), (2, 1))])
def test_loads_on_other_ranks_and_stages(
    worlds: dict[int, Any],
    make_config: Any,
    make_batch: Any,
    tiny_model: Path,
    tmp_path: Path,
    source: tuple[int, int],
    target: tuple[int, int],
) -> None:
    def config(stage: int) -> Any:
        return make_config(zero_stage=stage, micro_batch_tokens=60, optimizer=OPTIMIZER)

    old, new = worlds[source[0]], worlds[target[0]]
    trained(old, config(source[1]), tiny_model, make_batch, range(2))
    old.run("save", directory=tmp_path, tokenizer=tiny_model, memory={})
    wanted = old.run("state")[0]
    new.run("build", config=config(target[1]), model_path=tiny_model)
    new.run("load", directory=tmp_path)
    for got in new.run("state"):
        assert not [name for name in wanted if not np.array_equal(got[name], wanted[name])]
    # and it computes with what it loaded
    batch = make_batch(rows=4, seed=9).rollouts
    direct = transformers_logprobs(tmp_path / "hf", batch)
    for got, _ in new.run("call", method="logprobs", batch=batch):
        np.testing.assert_allclose(got, direct, atol=1e-5)
    train(new, make_batch, range(2, 3))


def transformers_logprobs(folder: Path, batch: Any) -> np.ndarray:
    """From the checkpoint's ordinary Hugging Face folder, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).decode([5, 6]) is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    out = np.zeros_like(batch.behavior_logprobs_BT)
    for b, (p, r) in enumerate(zip(batch.prompt_lengths_B, batch.response_lengths_B, strict=True)):
        ids = torch.from_numpy(batch.input_ids_BL[b, : p + r])
        with torch.no_grad():
            log_softmax = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        out[b, :r] = log_softmax[p - 1 : -1].gather(1, ids[p:, None])[:, 0].numpy()
    return out


def test_a_damaged_checkpoint_is_named(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path, tmp_path: Path
) -> None:
    world = worlds[1]
    world.run("build", config=make_config(), model_path=tiny_model)
    with pytest.raises(LearnerError, match=r"learner\.json"):
        world.run("load", directory=tmp_path)
    world.run("save", directory=tmp_path, tokenizer=tiny_model, memory={})
    (tmp_path / "policy-00000.safetensors").write_bytes(b"cut short")
    with pytest.raises(LearnerError, match=tmp_path.name):
        world.run("load", directory=tmp_path)


def test_a_full_disk_is_told(
    worlds: dict[int, Any], make_config: Any, tiny_model: Path, small_disk: Any, tmp_path: Path
) -> None:
    """In every file: as much room as those before it need, and no more."""
    world = worlds[1]
    world.run("build", config=make_config(), model_path=tiny_model)
    world.run("save", directory=tmp_path, tokenizer=tiny_model, memory={})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) > 1000 * 1024
    disk = small_disk(kib=1)
    named = set()
    for kib in (4, 100, 260, 300, 600, 900):
        disk.grow(kib)
        world.run("snapshot", memory={})
        with pytest.raises(DiskFullError, match="cannot be written: the disk is full") as caught:
            world.run("write", directory=disk.path / "learner", tokenizer=tiny_model)
        named.add(str(caught.value).split()[0].removeprefix(f"{disk.path}/learner/"))
        shutil.rmtree(disk.path / "learner")
    assert named == {"hf", "policy-00000.safetensors"}
    disk.grow(kib=4000)
    world.run("save", directory=disk.path / "learner", tokenizer=tiny_model, memory={})
    world.run("load", directory=disk.path / "learner")
