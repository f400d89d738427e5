"""The reference server against transformers' own full logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.models import Config
from rlsys.errors import DataError
from rlsys.reference.server import ReferenceServer, _Row
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, VersionSpan

TEMPERATURE = 0.6


def config(**reference: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"train": {"kind": "sums"}},
            "rewards": {"functions": [{"name": "sums", "kind": "sums"}]},
            "rollout": {"temperature": TEMPERATURE},
            "reference": reference,
        }
    )


def group(seed: int, prompt: int = 6) -> ScoredGroup:
    rng = np.random.default_rng(seed)
    asked = Prompt("p/0@0", 0, rng.integers(2, 90, prompt).astype(np.int32), "?", "sums", "1", seed)
    rollouts = tuple(
        Rollout(
            asked.id,
            sample,
            rng.integers(2, 90, length).astype(np.int32),
            np.ones(length, dtype=bool),
            np.zeros(length, dtype=np.float32),
            (VersionSpan(0, 0, length),),
            "stop",
            "",
        )
        for sample, length in enumerate([9, 1, 14, 5])
    )
    return ScoredGroup(RolloutGroup(asked, rollouts, "generator-0"), tuple(Reward("ok", 1.0) for _ in rollouts))


def direct(model_path: Path, scored: ScoredGroup) -> list[np.ndarray]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    out = []
    for rollout in scored.rollouts:
        ids = torch.tensor(np.concatenate([scored.prompt.token_ids, rollout.token_ids]).astype(np.int64))
        with torch.no_grad():
            log_softmax = (model(input_ids=ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
        p = len(scored.prompt.token_ids)
        out.append(log_softmax[p - 1 : -1].gather(1, ids[p:, None])[:, 0].numpy())
    return out


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_equal_to_direct_computation(tiny_model: Path, budget: int) -> None:
    """Of several groups with prompts and responses of different lengths; each at its place."""
    groups = [group(seed=3), group(seed=4, prompt=11), group(seed=5, prompt=2)]
    found = ReferenceServer(config(micro_batch_tokens=budget), tiny_model).logprobs(groups)
    for scored, got in zip(groups, found, strict=True):
        for array, wanted, rollout in zip(got, direct(tiny_model, scored), scored.rollouts, strict=True):
            assert array.dtype == np.float32
            assert array.shape == rollout.token_ids.shape
            np.testing.assert_allclose(array, wanted, atol=1e-5)


def test_a_batch_has_the_same_bits_whatever_was_scored_before(tiny_model: Path) -> None:
    server = ReferenceServer(config(micro_batch_tokens=60), tiny_model)
    batch = [group(seed=3), group(seed=5, prompt=2)]
    first = server.logprobs(batch)
    server.logprobs([group(seed=4)])
    for one, other in zip(server.logprobs(batch), first, strict=True):
        for array, wanted in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, wanted)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 100))
def test_micro_batches_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    server = object.__new__(ReferenceServer)  # no model: rows are all that is looked at
    server._budget = budget
    rows = [_Row(np.zeros(1, np.int32), np.zeros(length, np.int32)) for length in lengths]
    batches = list(server._micro_batches(rows))
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(rows[i].length for i in batch) <= budget


def test_its_own_path_comes_first(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        ReferenceServer(config(path=str(tmp_path / "other")), tiny_model)


@pytest.fixture
def cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_over_ray(tiny_model: Path, tmp_path: Path) -> None:
    import ray

    from rlsys.actors.reference import start_reference
    from rlsys.errors import WorkerDied

    with pytest.raises(DataError, match="no folder"):
        await start_reference(config(), tmp_path / "nothing")
    reference = await start_reference(config(), tiny_model)
    scored = group(seed=5)
    handles = await reference.logprobs([ray.put(group(seed=6)), ray.put(scored)])
    assert len(handles) == 2
    for array, wanted in zip(await handles[1], direct(tiny_model, scored), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-5)
    assert await reference.progress() == 1
    [report] = await reference.inspect()
    assert report.worker == "reference"
    assert "ray::ReferenceActor" in report.stacks
    ray.kill(reference.actor)
    with pytest.raises(WorkerDied, match="reference"):
        await reference.logprobs([ray.put(scored)])
    with pytest.raises(WorkerDied, match="reference"):
        await reference.progress()
    await reference.close()
