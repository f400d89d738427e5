"""Reasoning that has to be of use wherever it is stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rlsys.errors import ConfigError, SegmentError
from rlsys.registry import Count
from rlsys.roles import Branch, Sampling
from rlsys.segments import Partition, Pieces, Rounds, Strategy, continued, prefix_of
from rlsys.types import Reward, Rollout, RolloutGroup, ScoredGroup, Segment


@dataclass
class Budgets(Strategy):
    """Thinking that is stopped at several budgets, and summed up from there::

        c_{g,s}: mean score of `summaries` samples after the first b_s tokens of trace g (its own score if it has ended)
        R_{g,s} = sum_{j >= s} p_j c_{g,j}        p: linear in b, uniform, or all on the last
        V1 = [sum_{j < s} 2^j c_{g,j} / sum_{j < s} 2^j] * sum_{j >= s} p_j  (0 for s = 0),      V2 = mean_g R_{g,s}
        thinking between b_{s-1} and b_s:   A = R_{g,s} - (s * V1 + (S - s) * V2) / S             s = 0 .. S - 1
        a summary:   A = its score - mean over the summaries of the same trace and budget

    Qi et al. 2025 (BRPO, AnytimeReasoner), as in the authors' code: budgets 2000, 4000, 6000, 8000, 4 summaries, linear
    prior. The values of a segment are the two sides of the difference. A summary is a rollout of its own, of which only
    the summary is trained. `closing` is put after thinking that was stopped.
    """

    name = "budgets"
    paper = "Qi et al. 2025, Optimizing Anytime Reasoning via Budget Relative Policy Optimization, arXiv:2505.13438"
    branches = True

    budgets: tuple[Annotated[int, Field(gt=0)], ...] = (2000, 4000, 6000, 8000)
    summaries: Count = 4
    summary_tokens: Count = 256
    prior: Literal["linear", "uniform", "last"] = "linear"
    closing: str = ""

    def bind(self, partition: Partition, max_new_tokens: int, pieces: Pieces | None = None) -> None:
        super().bind(partition, max_new_tokens, pieces)
        if list(self.budgets) != sorted(set(self.budgets)) or not self.budgets:
            raise ConfigError(f"algorithm.rollout.budgets: {list(self.budgets)} must rise")
        if self.budgets[-1] + self.summary_tokens > max_new_tokens:
            raise ConfigError(
                f"algorithm.rollout: the last budget ({self.budgets[-1]}) and summary_tokens ({self.summary_tokens}) "
                f"are more than rollout.max_new_tokens ({max_new_tokens})"
            )

    def first(self, sampling: Sampling) -> Sampling:
        return replace(sampling, max_new_tokens=self.budgets[-1])

    def branch(self, rounds: Rounds) -> list[Branch]:
        if len(rounds) > 1:
            return []
        [group] = rounds[0]
        closing = self.encoded(self.closing)
        if (longest := self.budgets[-1] + len(closing)) >= self.max_new_tokens:
            raise SegmentError(
                f"algorithm.rollout.closing has {len(closing)} tokens: after budget {self.budgets[-1]} there is "
                f"no room for a summary in rollout.max_new_tokens ({self.max_new_tokens})"
            )
        return [
            Branch(
                continued(group.prompt, f"{trace.sample}.{s}", np.concatenate([trace.token_ids[:budget], closing])),
                self.summaries,
                min(self.summary_tokens, self.max_new_tokens - longest),
            )
            for trace in group.rollouts
            for s, budget in enumerate(self.budgets)
            if not _ended(trace, budget)
        ]

    def to_score(self, rounds: Rounds) -> list[RolloutGroup]:
        return [group for groups in rounds for group in groups]

    def assemble(self, rounds: Rounds, scored: Sequence[ScoredGroup]) -> ScoredGroup:
        whole = scored[0]
        ends = {part.prompt.id.rpartition("/")[2]: part for part in scored[1:]}
        traces, count = whole.rollouts, len(self.budgets)
        c = np.array(
            [
                [
                    whole.rewards[g].score if _ended(trace, b) else _mean(ends[f"{trace.sample}.{s}"])
                    for s, b in enumerate(self.budgets)
                ]
                for g, trace in enumerate(traces)
            ]
        )
        p = self._prior()
        returns = np.cumsum((p * c)[:, ::-1], axis=1)[:, ::-1]  # [g, s]; NaN where a score is missing
        rollouts: list[Rollout] = []
        rewards: list[Reward] = []
        for g, trace in enumerate(traces):
            segments, start = [], 0
            for s, budget in enumerate(self.budgets):
                end = min(budget, len(trace.token_ids))
                if end > start:
                    earlier = 2.0 ** np.arange(s)
                    v1 = float((earlier * c[g, :s]).sum() / earlier.sum() * p[s:].sum()) if s else 0.0
                    baseline = (s * v1 + (count - s) * float(np.nanmean(returns[:, s]))) / count
                    values = (baseline, float(returns[g, s])) if np.isfinite(returns[g, s] + v1) else (None, None)
                    segments.append(Segment(start, end, *values))
                    start = end
            rollouts.append(replace(trace, segments=tuple(segments)))
            rewards.append(whole.rewards[g])
        for part in scored[1:]:
            mean, prefix = _mean(part), prefix_of(part.prompt)
            for summary, reward in zip(part.rollouts, part.rewards, strict=True):
                trained = reward.status == "ok" and len(summary.token_ids) > 0
                if trained:
                    rollouts.append(_after(prefix, summary, len(rollouts), whole.prompt.id, mean, reward.score))
                    rewards.append(reward)
        return ScoredGroup(replace(whole.group, rollouts=tuple(rollouts)), tuple(rewards))

    def _prior(self) -> np.ndarray:
        """p [S], which sums to 1."""
        b = np.array(self.budgets, float)
        weights = {"linear": b, "uniform": np.ones_like(b), "last": (b == b[-1]).astype(float)}[self.prior]
        return np.asarray(weights / weights.sum())

    def expected_tokens(self, samples: int) -> float:
        return float(samples * (self.budgets[-1] + len(self.budgets) * self.summaries * self.summary_tokens))


def _ended(trace: Rollout, budget: int) -> bool:
    return len(trace.token_ids) <= budget and trace.finish_reason == "stop"


def _mean(group: ScoredGroup) -> float:
    """NaN when nothing was scored."""
    found = [reward.score for reward in group.rewards if reward.status == "ok"]
    return sum(found) / len(found) if found else float("nan")


def _after(prefix: np.ndarray, summary: Rollout, sample: int, prompt_id: str, mean: float, score: float) -> Rollout:
    """A summary with the thinking before it, of which nothing is trained."""
    before, length = len(prefix), len(prefix) + len(summary.token_ids)
    spans = tuple(s._replace(start=s.start + before, end=s.end + before) for s in summary.version_spans)
    return replace(
        summary,
        prompt_id=prompt_id,
        sample=sample,
        token_ids=np.concatenate([prefix, summary.token_ids]).astype(np.int32),
        action_mask=np.concatenate([np.zeros(before, bool), summary.action_mask]),
        behavior_logprobs=np.concatenate([np.zeros(before, np.float32), summary.behavior_logprobs]),
        version_spans=spans,
        segments=(Segment(0, before), Segment(before, length, mean, score)),
    )
