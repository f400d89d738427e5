"""Generalized advantage estimation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.return_to_go import returns_to_go
from rlsys.registry import NonNegative, NonNegativeCount, UnitInterval


@dataclass
class GAE(Estimator):
    """Advantages of single tokens from the critic's values, computed backwards over the trained tokens::

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        R_t     = A_t + V_t                                    the critic's target
        A       <- (A - mean(A)) / sqrt(var(A) + eps)          with whiten, over all trained tokens of the batch

    t + 1 is the next token that the policy chose: tokens of a tool or environment in between are stepped over. After
    the last one V = 0, also when the response was cut at its limit. Schulman et al. 2016, equation 16.

    With `extended` an unfinished response is no end: V after its last token is that of its last token, the reward of
    its last token (the score, and a KL in the reward) is left out, its last `drop_last` tokens are not trained on, and
    the critic learns nothing from it; the others' targets are the rewards to come (lam = 1). That is EGAE of truncated
    PPO, Fan et al. 2025, arXiv:2506.15050.
    """

    name = "gae"
    paper = "Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438"
    needs_values = True

    gamma: UnitInterval = 1.0
    lam: UnitInterval = 0.95
    whiten: bool = True
    eps: NonNegative = 1e-8
    extended: bool = False
    drop_last: NonNegativeCount = 0

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        assert inputs.values is not None, "gae needs the critic's values"
        mask, values = inputs.mask, inputs.values
        advantages = torch.zeros_like(values)
        cut = torch.zeros(len(values), dtype=torch.bool)
        if self.extended and inputs.finished is not None:
            cut = ~inputs.finished
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        rewards = inputs.token_rewards
        if cut.any():
            rewards = rewards.masked_fill(cut[:, None] & (torch.arange(mask.shape[1]) == last[:, None]), 0)
        next_value = torch.where(cut & mask.any(1), values.gather(1, last[:, None])[:, 0], 0.0)
        next_advantage = values.new_zeros(len(values))
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + self.gamma * next_value - values[:, t]
            advantage = delta + self.gamma * self.lam * next_advantage
            next_value = torch.where(mask[:, t], values[:, t], next_value)
            next_advantage = torch.where(mask[:, t], advantage, next_advantage)
            advantages[:, t] = torch.where(mask[:, t], advantage, 0)
        returns = advantages + values
        if self.extended:
            returns = returns_to_go(rewards, mask, self.gamma).float()
            returns = torch.where(cut[:, None], values, returns)  # no error, so no gradient
        returns = returns.masked_fill(~mask, 0)
        trained = mask
        if self.drop_last:
            to_come = mask.flip(1).cumsum(1).flip(1)  # trained tokens from here on
            trained = mask & ~(cut[:, None] & (to_come <= self.drop_last))
        if self.whiten:
            advantages = whiten(advantages, trained, self.eps)
        return Advantages(advantages.masked_fill(~trained, 0), returns, mask=trained)


def whiten(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the tokens of `mask`, var unbiased; unchanged for fewer than two tokens."""
    count = int(mask.sum())
    if count < 2:
        return values
    chosen = values[mask].double()
    scaled = (values.double() - chosen.mean()) / (chosen.var() + eps).sqrt()
    return scaled.float().masked_fill(~mask, 0)
