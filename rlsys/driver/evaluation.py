"""Evaluation beside the training work: the same generators and rewarders, no gate."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlsys.driver.generators import GeneratorPool, Request
from rlsys.driver.progress import Recorder
from rlsys.driver.rewarders import RewarderPool, Rounds
from rlsys.driver.waiting import stored, within
from rlsys.driver.weights import WeightRollout
from rlsys.driver.workers import WorkFailed
from rlsys.errors import BadRollout, EngineError, HandleLost
from rlsys.ledger.ledger import Ledger
from rlsys.roles import RolloutStore, Sampling
from rlsys.types import GroupInfo, Prompt

logger = logging.getLogger(__name__)


class Answered(NamedTuple):
    """A prompt of an evaluation; `responses` are the rows that the store keeps, none where it keeps none."""

    info: GroupInfo
    responses: Sequence[Mapping[str, Any]]


class Evaluator:
    """Samples and scores held-out prompts.

    Results go to the tracker and, under a key, to the ledger's facts; the responses to the first `keep` prompts, which
    are the same at every evaluation, go to the rollout store.
    """

    def __init__(
        self,
        generators: GeneratorPool,
        rewarders: RewarderPool,
        weights: WeightRollout,
        recorder: Recorder,
        ledger: Ledger,
        store: RolloutStore,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        timeout_s: float,
        keep: int,
    ) -> None:
        self._generators = generators
        self._rewarders = rewarders
        self._weights = weights
        self._recorder = recorder
        self._ledger = ledger
        self._store = store
        self._prompts = list(prompts)
        self._sampling = sampling
        self._timeout_s = timeout_s
        self._kept = {prompt.id for prompt in self._prompts[:keep]}
        self._running = False

    def result(self, key: str) -> dict[str, Any] | None:
        """`{"step": 0, "accuracy": 0.25, ...}`, see `summarize`; None when there is none yet."""
        result: dict[str, Any] | None = self._ledger.recall(f"eval.{key}")
        return result

    async def once(self, key: str, step: int) -> dict[str, Any] | None:
        """All prompts, unless this has been done at this step before. Raises EngineError past the deadline."""
        done = self.result(key)
        if self._prompts and (done is None or done["step"] != step):
            return await self._run(key, step, self._prompts)
        return None

    async def meanwhile(self, step: int, most: int | None) -> dict[str, Any] | None:
        """The first prompts (None: all), while training goes on; one that is too slow is reported and left out."""
        if self._running:
            logger.warning("no evaluation at step %d: the one before is still running", step)
            return None
        self._running = True
        try:
            return await self._run("last", step, self._prompts[:most])
        except EngineError as error:
            logger.warning("%s", error)
            self._ledger.note("evaluation failed", step=step, cause=str(error))
            return None
        finally:
            self._running = False

    async def _run(self, key: str, step: int, prompts: Sequence[Prompt]) -> dict[str, Any]:
        await self._weights.reached(step)
        late = EngineError(
            f"the evaluation at step {step} did not end within eval.timeout_s={self._timeout_s:g} s: "
            "raise it, or evaluate fewer prompts (eval.prompts, eval.every_prompts)"
        )
        with self._recorder.span(f"evaluation at {step}", "evaluation"):
            answered = await within(self._timeout_s, self._evaluate(prompts), late)
        if self._kept:  # first, so that what has figures has its responses, too
            await stored(self._store.evaluated(step, [row for one in answered for row in one.responses]))
        infos = [one.info for one in answered]
        result = summarize(infos, failed=len(prompts) - len(infos))
        self._recorder.evaluated(step, result, [s for info in infos for s in info.scores if not math.isnan(s)])
        rated = {"step": step, **result}
        self._ledger.remember(f"eval.{key}", rated)
        return rated

    async def _evaluate(self, prompts: Sequence[Prompt]) -> list[Answered]:
        """Without those that could not be sampled or scored."""
        generating = self._generators.submit([self._request(prompt) for prompt in prompts])
        results = await asyncio.gather(*map(self._score, prompts, generating))
        return [one for one in results if one is not None]

    def _request(self, prompt: Prompt) -> Request:
        return Request(prompt, self._sampling, training=False)

    async def _score(self, prompt: Prompt, generating: asyncio.Future[Any]) -> Answered | None:
        """What is lost on the way, with the node that had it, is sampled again."""
        while True:
            try:
                generated, _ = await generating
                [scoring] = self._rewarders.submit([Rounds(prompt.id, [[generated.payload]], training=False)])
                scored, _ = await scoring
                rows = await self._store.responses(scored.payload) if prompt.id in self._kept else ()
            except HandleLost as error:
                logger.warning("%s of the evaluation is sampled again: %s", prompt.id, error)
                [generating] = self._generators.submit([self._request(prompt)])
            except (WorkFailed, BadRollout) as error:
                logger.warning("a prompt of the evaluation is left out: %s", error)
                return None
            else:
                return Answered(scored.info, rows)


def summarize(infos: Sequence[GroupInfo], failed: int) -> dict[str, float]:
    """Figures of one evaluation.

    `accuracy` is the mean score of the scored rollouts, absent when there is none; with several rollouts of a prompt,
    `best_of_n` is the mean of each prompt's best score (pass@n, where scores are 0 or 1). Rollouts whose reward failed
    (`unscored`), and prompts that could not be sampled or scored at all (`failed`), are counted and take no part in it.
    """
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
    best = [max(found) for info in infos if (found := [s for s in info.scores if not math.isnan(s)])]
    if best and len(scores) > len(infos):
        out["best_of_n"] = sum(best) / len(best)
    if lengths:
        out["length_mean"] = sum(lengths) / len(lengths)
        out["truncated"] = sum(info.truncated for info in infos) / len(lengths)
        out["min_version"] = min(info.min_version for info in infos)
        out["max_version"] = max(info.max_version for info in infos)
    return out
