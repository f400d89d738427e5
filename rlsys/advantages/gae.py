"""Generalized advantage estimation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.registry import NonNegative, UnitInterval


@dataclass
class GAE(Estimator):
    """Advantages of single tokens from the critic's values, computed backwards over the trained tokens::

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        R_t     = A_t + V_t                                    the critic's target
        A       <- (A - mean(A)) / sqrt(var(A) + eps)          with whiten, over all trained tokens of the batch

    t + 1 is the next token that the policy chose: tokens of a tool or environment in between are stepped over. After
    the last one V = 0, also when the response was cut at its limit. Schulman et al. 2016, equation 16.
    """

    name = "gae"
    paper = "Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438"
    needs_values = True

    gamma: UnitInterval = 1.0
    lam: UnitInterval = 0.95
    whiten: bool = True
    eps: NonNegative = 1e-8

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        assert inputs.values is not None, "gae needs the critic's values"
        mask, values = inputs.mask, inputs.values
        advantages = torch.zeros_like(values)
        next_value = values.new_zeros(len(values))
        next_advantage = values.new_zeros(len(values))
        for t in reversed(range(values.shape[1])):
            delta = inputs.token_rewards[:, t] + self.gamma * next_value - values[:, t]
            advantage = delta + self.gamma * self.lam * next_advantage
            next_value = torch.where(mask[:, t], values[:, t], next_value)
            next_advantage = torch.where(mask[:, t], advantage, next_advantage)
            advantages[:, t] = torch.where(mask[:, t], advantage, 0)
        returns = (advantages + values).masked_fill(~mask, 0)
        if self.whiten:
            advantages = whiten(advantages, mask, self.eps)
        return Advantages(advantages, returns)


def whiten(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the tokens of `mask`, var unbiased; unchanged for fewer than two tokens."""
    count = int(mask.sum())
    if count < 2:
        return values
    chosen = values[mask].double()
    scaled = (values.double() - chosen.mean()) / (chosen.var() + eps).sqrt()
    return scaled.float().masked_fill(~mask, 0)
