"""Evaluation beside the training work: the same generators and rewarders, no gate."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from rlsys.driver.waiting import within
from rlsys.driver.workers import GeneratorPool, Request, RewarderPool, WorkFailed
from rlsys.errors import EngineError
from rlsys.roles import Sampling
from rlsys.types import GroupInfo, Prompt


class Evaluator:
    """Samples and scores a list of prompts.

    `accuracy` is the mean score of the scored rollouts. Rollouts whose reward failed, and prompts that could not be
    sampled or scored at all, are counted and take no part in it.
    """

    def __init__(
        self, generators: GeneratorPool, rewarders: RewarderPool, sampling: Sampling, timeout_s: float
    ) -> None:
        self._generators = generators
        self._rewarders = rewarders
        self._sampling = sampling
        self._timeout_s = timeout_s

    async def run(self, prompts: Sequence[Prompt], step: int) -> dict[str, float]:
        """accuracy (absent when nothing was scored), prompts, rollouts, unscored, failed, length_mean, truncated,
        min_version, max_version. Raises EngineError past the deadline."""
        late = EngineError(
            f"the evaluation at step {step} did not end within eval.timeout_s={self._timeout_s:g} s: "
            "raise it, or evaluate fewer prompts (eval.prompts, eval.every_prompts)"
        )
        return await within(self._timeout_s, self._run(prompts), late)

    async def _run(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        generating = self._generators.submit([Request(prompt, self._sampling) for prompt in prompts])
        results = await asyncio.gather(*(self._score(future) for future in generating))
        return summarize([info for info in results if info is not None], failed=results.count(None))

    async def _score(self, generating: asyncio.Future[Any]) -> GroupInfo | None:
        try:
            generated, _ = await generating
            [scoring] = self._rewarders.submit([generated.payload])
            scored, _ = await scoring
        except WorkFailed:
            return None  # reported by the pool; counted as failed
        return scored.info


def summarize(infos: Sequence[GroupInfo], failed: int) -> dict[str, float]:
    scores = [score for info in infos for score in info.scores]
    scored = [score for score in scores if not math.isnan(score)]
    lengths = [length for info in infos for length in info.lengths]
    out: dict[str, float] = {
        "prompts": len(infos) + failed,
        "rollouts": len(scores),
        "unscored": len(scores) - len(scored),
        "failed": failed,
    }
    if scored:
        out["accuracy"] = sum(scored) / len(scored)
    if lengths:
        out["length_mean"] = sum(lengths) / len(lengths)
        out["truncated"] = sum(info.truncated for info in infos) / len(lengths)
        out["min_version"] = min(info.min_version for info in infos)
        out["max_version"] = max(info.max_version for info in infos)
    return out
