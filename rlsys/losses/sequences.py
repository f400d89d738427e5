"""What losses on whole sequences share: sums and means of rows, and over the rows of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.losses import LossInputs


def log_ratio(inputs: LossInputs) -> Tensor:
    """clamp(log pi - log pi_prox, -20, 20) [B, T], 0 where masked."""
    return (inputs.logprobs - inputs.proximal_logprobs).clamp(-20, 20).masked_fill(~inputs.mask, 0)


def row_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Of the trained tokens of each row, [B, 1]."""
    return values.masked_fill(~mask, 0).sum(1, keepdim=True)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Of the trained tokens of each row, [B, 1]; 0 for a row without any."""
    return row_sum(values, mask) / mask.sum(1, keepdim=True).clamp(min=1)


def group_total(values: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """For every row, the sum of `values` [B] over the rows of its group that count (bool [B]), float64 [B]."""
    totals = torch.zeros(int(group.max()) + 1 if len(group) else 0, dtype=torch.float64, device=values.device)
    return totals.index_add_(0, group, torch.where(counts, values, 0).double())[group]


def group_mean(values: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """For every row, the mean over the rows of its group that count, float64 [B]; 0 where none does."""
    return group_total(values, group, counts) / group_total(counts.double(), group, counts).clamp(min=1)


def sequence_advantage(inputs: LossInputs) -> Tensor:
    """One advantage per row, [B]: the mean over its tokens, which usually have all the same."""
    return row_mean(inputs.advantages, inputs.mask)[:, 0]
