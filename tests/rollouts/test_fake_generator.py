"""The stand-in for vLLM keeps the contract of a generator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.config.models import Config
from rlsys.errors import EngineError, ModelMismatchError, WeightUpdateError, WorkerDied
from rlsys.roles import Probe, PublishedWeights, Sampling
from rlsys.rollouts.fake import END, TENSOR, VOCABULARY, FakeGenerator
from rlsys.types import Prompt, RolloutGroup
from rlsys.weights.publish import pack

CONFIG = Config.model_validate(
    {
        "model": {"path": "unused"},
        "prompts": {"train": {"kind": "sums"}},
        "rewards": {"functions": [{"name": "a", "kind": "sums"}]},
    }
)


def prompt(seed: int) -> Prompt:
    return Prompt(f"p/{seed}", seed, np.array([3, 4], dtype=np.int32), "", "", None, seed=seed)


def published(version: int, logits: np.ndarray) -> PublishedWeights:
    payload, manifest = pack([(TENSOR, torch.from_numpy(logits.astype(np.float32)))], version)
    logprobs = torch.from_numpy(logits).log_softmax(0)
    return PublishedWeights(version, manifest, payload, Probe((0, 5, 9), (float(logprobs[5]), float(logprobs[9]))))


async def started() -> FakeGenerator:
    generator = FakeGenerator("generator-0", CONFIG, Path("unused"))
    await generator.start()
    return generator


async def sample(generator: FakeGenerator, seeds: list[int], sampling: Sampling) -> list[RolloutGroup]:
    return list(await asyncio.gather(*await generator.generate([prompt(seed) for seed in seeds], sampling)))


async def test_samples_are_seeded_and_counted() -> None:
    generator = await started()
    first, second = [await sample(generator, [10, 11], Sampling(n=3, max_new_tokens=50)) for _ in range(2)]
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.rollouts, b.rollouts, strict=True):
            assert np.array_equal(x.token_ids, y.token_ids)
    assert np.array_equal(first[0].rollouts[1].token_ids, first[1].rollouts[0].token_ids)  # seed 10 + 1 = seed 11 + 0
    assert await generator.progress() == 2 * sum(len(x.token_ids) for group in first for x in group.rollouts)


async def test_the_end_token_stops_a_rollout_and_is_part_of_it() -> None:
    (group,) = await sample(await started(), [0], Sampling(n=40, max_new_tokens=30))
    reasons = {rollout.finish_reason for rollout in group.rollouts}
    assert reasons == {"stop", "length"}
    for rollout in group.rollouts:
        assert (rollout.token_ids[-1] == END) == (rollout.finish_reason == "stop")
        assert END not in rollout.token_ids[:-1]


async def test_an_update_in_flight_changes_the_policy_of_later_tokens() -> None:
    generator = await started()
    awaitables = await generator.generate([prompt(0)], Sampling(n=4, max_new_tokens=100, ignore_eos=True))
    policies = {0: np.zeros(VOCABULARY)}
    for version in (1, 2):
        for _ in range(20):
            await asyncio.sleep(0)
        policies[version] = np.random.default_rng(version).normal(size=VOCABULARY)
        report = await generator.update(published(version, policies[version]))
        assert report.version == version
        assert report.probe_difference < 1e-6
    group = await awaitables[0]
    for rollout in group.rollouts:
        assert [span.version for span in rollout.version_spans] == [0, 1, 2]
        assert (rollout.versions >= 0).all()
        for version, start, end in rollout.version_spans:
            logprobs = torch.from_numpy(policies[version]).log_softmax(0).numpy()
            np.testing.assert_allclose(
                rollout.behavior_logprobs[start:end], logprobs[rollout.token_ids[start:end]], atol=1e-6
            )


async def test_what_is_not_as_it_should_be_is_refused() -> None:
    generator = await started()
    await generator.update(published(2, np.zeros(VOCABULARY)))
    good = published(3, np.ones(VOCABULARY))
    damaged = good.payload.copy()
    damaged[0] ^= 1
    bad: list[Any] = [
        published(1, np.zeros(VOCABULARY)),
        published(3, np.zeros(VOCABULARY - 1)),
        PublishedWeights(4, good.manifest, good.payload, good.probe),
        PublishedWeights(3, good.manifest, damaged, good.probe),
        PublishedWeights(3, good.manifest, good.payload, Probe((0, 5), (-1.0,))),
    ]
    for weights in bad:
        with pytest.raises(WeightUpdateError):
            await generator.update(weights)
    assert generator.version == 2
    await generator.update(good)


async def test_a_probe_that_fails_at_once_tells_of_two_implementations() -> None:
    generator = await started()
    good = published(1, np.ones(VOCABULARY))
    with pytest.raises(ModelMismatchError, match="a unigram"):
        await generator.update(PublishedWeights(1, good.manifest, good.payload, Probe((0, 5), (-1.0,))))
    assert generator.version == 0


async def test_before_the_start_and_after_the_end_there_is_no_answer() -> None:
    generator = FakeGenerator("generator-0", CONFIG, Path("unused"))
    with pytest.raises(EngineError, match="not been started"):
        await generator.progress()
    await generator.start()
    (running,) = await generator.generate([prompt(0)], Sampling(n=1, max_new_tokens=10_000, ignore_eos=True))
    await generator.close()
    with pytest.raises(WorkerDied, match="generator-0"):
        await running
    with pytest.raises(WorkerDied):
        await generator.generate([prompt(0)], Sampling(n=1, max_new_tokens=1))
