"""One weight update while requests run: how long it takes, how long generation stands still, and where it goes."""

from __future__ import annotations

import asyncio
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import Result, config, prompts, seconds, tiny_model
from benchmarks.learner import groups, start_rank
from rlsys.roles import Sampling, UpdateReport

PARTS = ("gather", "transfer", "load", "pause")


def run(rounds: int, count: int = 32, samples: int = 8) -> Result:
    """Learner rank here, generator in a Ray actor with all slots busy; recompute and keep, as ratios to a step."""
    import ray

    from rlsys.actors.cluster import start_cluster
    from rlsys.rollouts.settings import prepare_environment

    model = tiny_model()
    prepare_environment(config(), os.environ)
    made = groups(model, 64, samples)
    rank = start_rank(model)
    start_cluster(config())
    rows: list[tuple[str, str, str]] = []
    figures: dict[str, Any] = {}
    try:
        rank.step(made)
        step_s = statistics.median(seconds(lambda: rank.step(made)) for _ in range(rounds))
        figures["learner_step_s"] = step_s
        for kv_cache in ("recompute", "keep"):
            updates = asyncio.run(_updates(rank, made, model, kv_cache, rounds, count, samples))
            median = {
                part: statistics.median(
                    gather if part == "gather" else getattr(report, f"{part}_s") for gather, report in updates
                )
                for part in PARTS
            }
            whole = sum(median.values())
            stall = median["load"] + median["pause"]
            figures[kv_cache] = {f"{part}_s": value for part, value in median.items()}
            split = ", ".join(f"{part} {value / whole:.0%}" for part, value in median.items())
            rows += [
                (
                    f"{kv_cache}: whole update",
                    f"{whole / step_s:.1%} of a learner step",
                    f"{1e3 * whole:.0f} ms: {split}",
                ),
                (
                    f"{kv_cache}: generation stands still",
                    f"{stall / step_s:.1%} of a learner step",
                    f"{1e3 * stall:.0f} ms",
                ),
            ]
    finally:
        rank.close()
        ray.shutdown()
    title = f"Weight update with {count * samples} requests running, {rounds} rounds each"
    return Result("weight_update", title, tuple(rows), figures)


async def _updates(
    rank: Any, made: list[Any], model: Path, kv_cache: str, rounds: int, count: int, samples: int
) -> list[tuple[float, UpdateReport]]:
    """(seconds of gathering, the generator's report) of each update."""
    import ray

    from rlsys.actors.generator import start_generator

    settings = config(weights={"kv_cache": kv_cache})
    generator = await start_generator("generator-0", settings, model)
    out = []
    try:
        for _ in range(rounds + 1):
            rank.step(made)
            weights = rank.publish()
            assert weights is not None
            before = await generator.progress()
            sampling = Sampling(n=samples, max_new_tokens=40, ignore_eos=True)
            answers = await generator.generate(prompts(count, model), sampling)
            async with asyncio.timeout(60):
                while await generator.progress() == before:  # until the requests run
                    pass
            payload = ray.put(weights.payload)
            out.append((weights.gather_s, await generator.update(replace(weights, payload=payload))))
            for answer in answers:
                await answer
    finally:
        await generator.close()
    return out[1:]
