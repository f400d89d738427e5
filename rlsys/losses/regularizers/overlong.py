"""A penalty for responses that come near the length limit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlsys.losses import LossInputs, Regularizer, TokenLoss
from rlsys.registry import Count, NonNegative


@dataclass
class Overlong(Regularizer):
    """Soft overlong punishment: the score falls over the last tokens before the limit::

        score += coefficient * min((length - buffer - |y|) / buffer, 0)      |y| response tokens, at least -coefficient

    DAPO, arXiv:2503.14476, equation 13: length = 20480, buffer = 4096, coefficient = 1. `length` should be
    `rollout.max_new_tokens`.
    """

    name = "overlong"
    paper = "Yu et al. 2025, DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476"

    coefficient: NonNegative = 1.0
    length: Count = 20480
    buffer: Count = 4096
    in_reward: bool = field(default=True, init=False)

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        return TokenLoss(torch.zeros_like(inputs.logprobs))

    def reward(self, behavior_logprobs: Tensor, reference_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        tokens = mask.sum(1)
        penalty = ((self.length - self.buffer - tokens) / self.buffer).clamp(-1, 0) * self.coefficient
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        added = torch.zeros(mask.shape)
        added[torch.arange(len(mask)), last] = torch.where(tokens > 0, penalty, 0).float()
        return added
