"""Branches that start right after a weight update: exact, or from the states that the old weights have cached."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.common import Ratio, Result, config, tiny_model
from benchmarks.learner import groups, start_rank
from rlsys.roles import Generated, PublishedWeights, Sampling
from rlsys.types import Prompt

LENGTH, NEW_TOKENS = 1024, 16
COUNT, SAMPLES = 8, 8
LEARNING_RATE = 3e-4  # the quickstart's


def run(rounds: int) -> Result:
    """Two generators in turn, `weights.kv_cache: recompute` and `share`; a real update before every round."""
    import ray

    from rlsys.actors.cluster import start_cluster
    from rlsys.rollouts.settings import prepare_environment

    prepare_environment(config(), os.environ)
    model = tiny_model(LENGTH)
    rank = start_rank(model, learner={"threads": 1, "optimizer": {"learning_rate": LEARNING_RATE, "warmup_steps": 0}})
    start_cluster(config())
    rows, figures = [], {}
    try:
        with asyncio.Runner() as runner:
            exact = _Side(runner, "recompute", model)
            share = _Side(runner, "share", model)
            for prefix in (128, 384, 896):
                rng = np.random.default_rng(prefix)

                def both(prefix: int = prefix, rng: Any = rng) -> tuple[float, float]:
                    made = [
                        Prompt(f"p{i}", i, rng.integers(3, 40, prefix + 8).astype(np.int32), "", "", None, seed=i)
                        for i in range(COUNT)
                    ]
                    rank.step(groups(model, 16, 4))
                    weights = rank.publish()
                    return exact.branches(made, weights), share.branches(made, weights)

                ratio = Ratio.of([both() for _ in range(rounds + 1)][1:])
                cached = share.last[0].info.old_states
                error = share.error(model, rank.publish())
                rows.append(
                    (
                        f"prefixes of {prefix} tokens",
                        f"exact takes {ratio} times as long",
                        f"{cached} of {prefix + 8} tokens of old states; log-probs off by {error:.4f} on average",
                    )
                )
                figures[str(prefix)] = {"ratio": ratio.median, "old_states": cached, "error": error}
            exact.close()
            share.close()
    finally:
        rank.close()
        ray.shutdown()
    title = (
        f"Branches after an update: {COUNT} prefixes x {SAMPLES} samples x {NEW_TOKENS} tokens, `kv_cache` recompute "
        "over share"
    )
    return Result("prefix_cache", title, tuple(rows), figures)


class _Side:
    """A generator with one of the two settings."""

    def __init__(self, runner: asyncio.Runner, kv_cache: str, model: Any) -> None:
        from rlsys.actors.generator import start_generator

        settings = config(model={"tiny": {}, "max_length": LENGTH}, weights={"kv_cache": kv_cache})
        self._runner = runner
        self._generator = runner.run(start_generator(f"generator-{kv_cache}", settings, model))
        self.last: Sequence[Generated] = ()

    def branches(self, prompts: Sequence[Prompt], weights: PublishedWeights) -> float:
        """Seconds of the branches; the prompts have been sampled from before the update."""
        return self._runner.run(self._branches(prompts, weights))

    async def _branches(self, prompts: Sequence[Prompt], weights: PublishedWeights) -> float:
        import ray

        await asyncio.gather(*await self._generator.generate(prompts, Sampling(n=1, max_new_tokens=1)))
        await self._generator.update(replace(weights, payload=ray.put(weights.payload)))
        again = [replace(prompt, id=f"{prompt.id}/0", seed=prompt.seed + 100) for prompt in prompts]
        sampling = Sampling(n=SAMPLES, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        started = time.perf_counter()
        self.last = await asyncio.gather(*await self._generator.generate(again, sampling))
        return time.perf_counter() - started

    def error(self, model: Any, weights: PublishedWeights) -> float:
        """Mean difference of the log-probs of the last branches to what the weights say of them."""
        import ray
        import torch

        from rlsys.models.loading import load_causal_lm
        from rlsys.weights.publish import unpack

        bare: Any = load_causal_lm(model, torch.float32)
        bare.load_state_dict(unpack(weights.payload, weights.manifest), strict=False)
        found = []
        for generated in self.last:
            group: Any = ray.get(generated.payload)
            for rollout in group.rollouts:
                ids = np.concatenate([group.prompt.token_ids, rollout.token_ids])
                with torch.no_grad():
                    logits = bare(torch.from_numpy(ids[None]).long()).logits[0, -len(rollout.token_ids) - 1 : -1]
                told = logits.log_softmax(-1).numpy()[np.arange(len(rollout.token_ids)), rollout.token_ids]
                found.append(np.abs(told - rollout.behavior_logprobs).mean())
        return float(np.mean(found))

    def close(self) -> None:
        self._runner.run(self._generator.close())
