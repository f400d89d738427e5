"""More samples for the prompts that can teach more."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlsys.curricula import Choice, Curriculum, Seen
from rlsys.registry import Count
from rlsys.types import Progress


def value(samples: int, p: float) -> float:
    """What `samples` rollouts of a prompt with success rate p are worth: P(there is a gradient) * p * (1 - p)^2."""
    return (1 - p**samples - (1 - p) ** samples) * p * (1 - p) ** 2


def allocate(rates: Sequence[float], total: int, lowest: int, highest: int) -> list[int]:
    """Samples of each prompt that sum to `total` (as near as the limits allow) and have the largest sum of values.

    `value` is concave in the number of samples from 1 on: one sample more brings p^n (1 - p) + (1 - p)^n p times a
    constant, which falls with n. So giving the samples out one by one to whoever gains most is optimal.
    """
    counts = [lowest] * len(rates)
    gains = [(value(lowest, p) - value(lowest + 1, p), i) for i, p in enumerate(rates) if lowest < highest]
    heapq.heapify(gains)
    for _ in range(total - lowest * len(rates)):
        if not gains:
            break
        _, i = heapq.heappop(gains)
        counts[i] += 1
        if counts[i] < highest:
            heapq.heappush(gains, (value(counts[i], rates[i]) - value(counts[i] + 1, rates[i]), i))
    return counts


@dataclass
class SuccessBudget(Curriculum):
    """Prompts in order, with as many samples as they are worth, at the same number of samples in all::

        max sum_i V(n_i, p_i)      subject to   sum_i n_i = samples * prompts,   lowest <= n_i <= highest
        V(n, p) = (1 - p^n - (1 - p)^n) * p * (1 - p)^2

    Li et al. 2025 (Knapsack RL): lowest = 2, highest = 128. p is the success rate at the prompt's last visit (the share
    of scores above 0.5), so solved prompts get `lowest`. A prompt that was never seen, or never solved (whose V is 0
    for any n), has `rollout.samples_per_prompt` and is no part of the knapsack. A knapsack is what is drawn at once:
    a batch with a bound of 0, whatever slots are open otherwise.
    """

    name = "success-budget"
    paper = (
        "Li et al. 2025, Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation, arXiv:2509.25849"
    )
    unverified = "what prompts that were never solved are given (here: the average number of samples)"
    needs_repeats = True

    lowest: Count = 2
    highest: Count = 128
    rates: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.highest < self.lowest:
            raise ValueError(f"highest ({self.highest}) is below lowest ({self.lowest})")

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        choices = [self.in_order(index) for index in indices]
        inside = [i for i, choice in enumerate(choices) if self.rates.get(str(choice.row), 0) > 0]
        rates = [self.rates[str(choices[i].row)] for i in inside]
        for i, samples in zip(
            inside, allocate(rates, self.samples * len(inside), self.lowest, self.highest), strict=True
        ):
            choices[i] = replace(choices[i], samples=samples)
        return choices

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        for one in seen:
            scores = [score for score in one.info.scores if score == score]
            if scores:
                self.rates[str(one.choice.row)] = sum(score > 0.5 for score in scores) / len(scores)
        counts = [self.samples if one.choice.samples is None else one.choice.samples for one in seen]
        if not counts:
            return {}
        known = list(self.rates.values())
        return {
            "curriculum/samples_max": float(max(counts)),
            "curriculum/samples_min": float(min(counts)),
            "curriculum/known": float(len(known)),
            "curriculum/in_between": sum(0 < p < 1 for p in known) / max(1, len(known)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rates = dict(state["rates"])
