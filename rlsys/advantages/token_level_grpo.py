"""Group-relative advantages with statistics over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_statistics, group_sum, to_tokens
from rlsys.registry import NonNegative, Positive


@dataclass
class TokenLevelGRPO(Estimator):
    """The mean and deviation of a group are taken over its tokens, so that they are zero-sum under a mean over tokens::

        mu, sd: mean and population deviation of r over all trained tokens of the group
        A_i = (r_i - mu) / (sd + eps);      the advantage of `grpo` for a group with any |A_i| >= largest

    Liu et al. 2025 (HAPO), section 3.2, largest = 5.
    """

    name = "token-level-grpo"
    paper = (
        "Liu et al. 2025, From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token, arXiv:2509.16591"
    )

    eps: NonNegative = 1e-6
    largest: Positive = 5.0

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        scores, group, scored = inputs.scores.double(), inputs.group, inputs.scored
        tokens = inputs.mask.sum(1).double()
        total = group_sum(tokens, group, scored).clamp(min=1)
        mean = group_sum(tokens * scores, group, scored) / total
        deviation = (group_sum(tokens * (scores - mean).square(), group, scored) / total).sqrt()
        advantages = torch.where(deviation > 1e-9, (scores - mean) / (deviation + self.eps), 0)
        _, plain_mean, std = group_statistics(inputs.scores, group, scored)
        plain = torch.where(std > 0, (scores - plain_mean) / (std + self.eps), 0)
        extreme = (advantages.abs() >= self.largest) & inputs.mask.any(1)
        fallback = group_sum(extreme.double(), group, scored) > 0
        return Advantages(to_tokens(torch.where(fallback, plain, advantages), inputs.mask))
