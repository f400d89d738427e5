"""Scores normalised by their running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Combiner, Estimate
from rlsys.metrics import Last, Metric, merge
from rlsys.registry import Positive


@dataclass
class RunningNormalization(Combiner):
    """The score over the mean and deviation of all scores so far, bounded::

        r <- clip((r - mean) / (std + 1e-8), -bound, bound)         statistics of all batches up to this one

    The reward reparametrisation of PPO-max, Zheng et al. 2023, section 4, bound = 10.
    """

    name = "running-normalization"
    paper = "Zheng et al. 2023, Secrets of RLHF in Large Language Models Part I: PPO, arXiv:2307.04964"
    needs_components = False

    bound: Positive = 10.0
    count: float = field(default=0.0, init=False)
    mean: float = field(default=0.0, init=False)
    square: float = field(default=0.0, init=False)  # sum of squared deviations

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        scores = inputs.scores[inputs.scored].double()
        if len(scores):
            count = self.count + len(scores)
            shift = float(scores.mean()) - self.mean
            self.square += float((scores - scores.mean()).square().sum()) + shift**2 * self.count * len(scores) / count
            self.mean += shift * len(scores) / count
            self.count = count
        deviation = (self.square / self.count) ** 0.5 if self.count else 0.0
        normalised = ((inputs.scores - self.mean) / (deviation + 1e-8)).clamp(-self.bound, self.bound)
        out = estimate(torch.where(inputs.scored, normalised, 0) if deviation > 0 else inputs.scores * 0)
        metrics: dict[str, Metric] = {"rewards/running_mean": Last(self.mean), "rewards/running_std": Last(deviation)}
        return replace(out, metrics=merge([out.metrics, metrics]))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]
