"""Generated tokens a second through the whole path, over bare vLLM on the same prompts."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from benchmarks.common import NEW_TOKENS, Result, config, paired, prompts, tiny_model
from rlsys.config.models import Config
from rlsys.roles import Sampling
from rlsys.types import Prompt


def run(rounds: int, count: int = 64, samples: int = 8) -> Result:
    """Ours: Ray actor, groups, seeds, log-probs, version spans, object store. Bare: `vllm.LLM` in a process of its own.

    Both sample the same number of tokens: the end of sequence is ignored.
    """
    import ray

    from rlsys.actors.cluster import start_cluster
    from rlsys.rollouts.settings import prepare_environment

    settings, model = config(), tiny_model()
    prepare_environment(settings, os.environ)
    made = prompts(count, model)
    tokens = count * samples * NEW_TOKENS
    bare, end_bare = _bare(settings, model, made, samples)
    start_cluster(settings)
    try:
        with asyncio.Runner() as runner:
            ours, end_ours = _ours(runner, settings, model, made, samples)
            ratio, bare_s, ours_s = paired(bare, ours, rounds)
            end_ours()
    finally:
        ray.shutdown()
        end_bare()
    return Result(
        "generator",
        "Generator: tokens a second through the whole path, over bare vLLM",
        (
            (
                "ratio",
                str(ratio),
                f"{count} prompts x {samples} samples x {NEW_TOKENS} tokens, {rounds} rounds; 0.85 wanted",
            ),
            ("rlsys", f"{tokens / ours_s:,.0f} tokens/s", "Ray actor, seeds, log-probs, version spans"),
            ("bare vLLM", f"{tokens / bare_s:,.0f} tokens/s", "`vllm.LLM.generate`, log-probs of the sampled tokens"),
        ),
        {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, "ours_s": ours_s, "bare_s": bare_s},
    )


def _bare(
    settings: Config, model: Path, made: list[Prompt], samples: int
) -> tuple[Callable[[], float], Callable[[], None]]:
    from vllm import LLM, EngineArgs, SamplingParams

    from rlsys.rollouts.settings import engine_args

    given = engine_args(settings, model)
    changed: dict[str, Any] = {
        field.name: getattr(given, field.name)
        for field in fields(EngineArgs)
        if field.default is MISSING or getattr(given, field.name) != field.default
    }
    llm = LLM(**changed)
    inputs: list[Any] = [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in made]
    params = [
        SamplingParams(
            n=samples,
            max_tokens=NEW_TOKENS,
            temperature=1.0,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            seed=p.seed,
        )
        for p in made
    ]

    def generate() -> float:
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        elapsed = time.perf_counter() - started
        assert sum(len(c.token_ids) for o in outputs for c in o.outputs) == len(made) * samples * NEW_TOKENS
        return elapsed

    return generate, llm.llm_engine.engine_core.shutdown


def _ours(
    runner: asyncio.Runner, settings: Config, model: Path, made: list[Prompt], samples: int
) -> tuple[Callable[[], float], Callable[[], None]]:
    from rlsys.actors.generator import start_generator

    generator = runner.run(start_generator("generator-0", settings, model))
    sampling = Sampling(n=samples, max_new_tokens=NEW_TOKENS, ignore_eos=True)

    async def once() -> float:
        started = time.perf_counter()
        groups = [await answer for answer in await generator.generate(made, sampling)]
        elapsed = time.perf_counter() - started
        assert sum(group.info.tokens for group in groups) == len(made) * samples * NEW_TOKENS
        return elapsed

    return lambda: runner.run(once()), lambda: runner.run(generator.close())
