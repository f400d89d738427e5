"""Solve rates of prompts, for negative-aware fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.metrics import Mean
from rlsys.registry import UnitInterval


@dataclass
class SolveRate(Estimator):
    """How often a prompt was solved, and how much it is to count::

        right_i = 1[score_i > threshold]        r = mean(right) of the group, clamped to (smallest, 1 - smallest)
        w = 1 - r                               weight = linear
        w = sqrt((1 - r) / r)                   weight = deviation, which makes NFT equal to GRPO on-policy
        A_i = w * (right_i - r) / (1 - r)       for the record: w for right answers, -w * r / (1 - r) for wrong ones
        w = 0                                   where all answers of a prompt are right, or all wrong

    Chen et al. 2025, section 3.3, smallest = 0.02. The loss `nft` works with the extras.
    """

    name = "solve-rate"
    paper = (
        "Chen et al. 2025, Bridging Supervised Learning and Reinforcement Learning in Math Reasoning, arXiv:2505.18116"
    )
    provides = ("solve_rate", "prompt_weight", "right")

    threshold: float = 0.5
    smallest: UnitInterval = 0.02
    weight: Literal["linear", "deviation"] = "linear"

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        right = (inputs.scores > self.threshold).double()
        _, mean, _ = group_statistics(right, inputs.group, inputs.scored)
        rate = mean.clamp(self.smallest, 1 - self.smallest)
        mixed = (mean > 0) & (mean < 1)  # else there is nothing to tell right from wrong by
        weight = 1 - rate if self.weight == "linear" else ((1 - rate) / rate).sqrt()
        weight = torch.where(mixed, weight, 0)
        advantages = weight * (right - rate) / (1 - rate)
        extras = {"solve_rate": rate, "prompt_weight": weight, "right": right}
        return Advantages(
            to_tokens(advantages, inputs.mask),
            metrics={
                "nft/solve_rate": Mean(float(torch.where(inputs.scored, mean, 0).sum()), float(inputs.scored.sum()))
            },
            extras={name: to_tokens(value, inputs.mask) for name, value in extras.items()},
        )
