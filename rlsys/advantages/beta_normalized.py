"""Advantages normalised by a Beta distribution of solve rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.metrics import Last
from rlsys.registry import Positive


def beta_density(p: Tensor, a: float, b: float) -> Tensor:
    """f(p) of Beta(a, b), float64."""
    a_, b_ = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    scale = torch.lgamma(a_ + b_) - torch.lgamma(a_) - torch.lgamma(b_)
    return scale.exp() * p.double() ** (a - 1) * (1 - p.double()) ** (b - 1)


@dataclass
class BetaNormalized(Estimator):
    """Mean-centred scores over a density that follows the solve rates of the batch::

        p_q = mean(r) of the group       m, v = mean and unbiased variance of p over the prompts of the batch
        a = (m * (1 - m) / v - 1) * m    b = (m * (1 - m) / v - 1) * (1 - m)
        A_i = (r_i - p_q) / f(p_q),      f the density of Beta(max(1, 1 + a / 3), max(1, 1 + b / 3))

    Xiao et al. 2025 (BNPO), as in the authors' code; scores are in [0, 1], 1 / f is at most `largest`. Beta(1, 1) is
    REINFORCE with a mean baseline, Beta(3/2, 3/2) is GRPO but for a constant. Where all prompts have the same rate
    there is no variance to fit, and f is 1. Not TRL's loss of the same name, which only averages over the local tokens.
    """

    name = "beta-normalized"
    paper = "Xiao et al. 2025, BNPO: Beta Normalization Policy Optimization, arXiv:2506.02864"

    largest: Positive = 1e6

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        count, mean, _ = group_statistics(inputs.scores, inputs.group, inputs.scored)
        rates = torch.stack(
            [mean[inputs.group == g][0] for g in inputs.group.unique() if count[inputs.group == g][0] > 0]
            or [mean.sum()]
        ).clamp(0, 1)
        alpha = beta = 1.0
        middle, spread = float(rates.mean()), float(rates.var()) if len(rates) > 1 else 0.0
        if spread > 0:
            strength = middle * (1 - middle) / spread - 1
            alpha, beta = max(1.0, 1 + strength * middle / 3), max(1.0, 1 + strength * (1 - middle) / 3)
        weight = (1 / beta_density(mean.clamp(0, 1), alpha, beta)).clamp(0, self.largest)
        advantages = (inputs.scores - mean) * weight
        # (r - p) is 0 where every score is, whatever the weight says
        advantages = torch.where((inputs.scores - mean).abs() > 1e-9, advantages, 0)
        metrics = {"bnpo/alpha": Last(alpha), "bnpo/beta": Last(beta)}
        return Advantages(to_tokens(advantages, inputs.mask), metrics=metrics)
