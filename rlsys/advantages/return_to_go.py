"""Returns to go, without a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.registry import UnitInterval


def returns_to_go(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum_{s >= t} gamma^(s - t) * r_s over the trained tokens, float64 [B, T], 0 where masked.

    Tokens in between that are not trained on (a tool's output) do not discount.
    """
    returns = torch.zeros(token_rewards.shape, dtype=torch.float64)
    running = torch.zeros(len(token_rewards), dtype=torch.float64)
    for t in reversed(range(token_rewards.shape[1])):
        here = mask[:, t]
        running = torch.where(here, token_rewards[:, t].double() + gamma * running, running)
        returns[:, t] = torch.where(here, running, 0)
    return returns


@dataclass
class ReturnToGo(Estimator):
    """Every token gets the rewards that come after it, the KL penalties among them::

        A_t = sum_{s >= t} gamma^(s - t) * r_s

    Of REINFORCE++, Hu 2025, section 3, where the advantages are then whitened over the batch (adjustment `whiten`).
    """

    name = "return-to-go"
    paper = "Hu 2025, REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models, arXiv:2501.03262"

    gamma: UnitInterval = 1.0

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        rewards = inputs.token_rewards * inputs.scored[:, None]
        return Advantages(returns_to_go(rewards, inputs.mask, self.gamma).float())
