"""What the group estimators share: statistics over the scored rollouts of each prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(values: Tensor, group: Tensor, scored: Tensor) -> Tensor:
    """For every row, the sum of `values` [B] over the scored rows of its group, float64 [B]."""
    sums = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=torch.float64)
    return sums.index_add_(0, group, torch.where(scored, values, 0).double())[group]


def group_statistics(scores: Tensor, group: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every row: number, mean and unbiased standard deviation of the scored scores of its group, float64 [B].

    A group without a scored row has mean 0; one with fewer than two has standard deviation 0. In float64, so that equal
    scores have a deviation that is far below any `eps`.
    """
    count = group_sum(torch.ones_like(scores), group, scored)
    mean = group_sum(scores, group, scored) / count.clamp(min=1)
    squares = group_sum((scores.double() - mean).square(), group, scored)
    return count, mean, (squares / (count - 1).clamp(min=1)).sqrt()


def to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """One number per rollout [B], given to each of its trained tokens: float32 [B, T]."""
    return advantages.float()[:, None] * mask
