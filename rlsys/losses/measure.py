"""Metrics of one micro-batch, weighted by trained tokens, so that they add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlsys.metrics import Max, Mean, Metric


def token_means(mask: Tensor, values: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Mean over the tokens of `mask` [B, T] of each of `values` [B, T], with one transfer from the device for all."""
    sums = [value.detach().masked_fill(~mask, 0).sum(dtype=torch.float64) for value in values.values()]
    totals = torch.stack([*sums, mask.sum(dtype=torch.float64)]).tolist()
    return {name: Mean(total, totals[-1]) for name, total in zip(values, totals[:-1], strict=True)}


def token_max(mask: Tensor, values: Mapping[str, Tensor]) -> dict[str, Metric]:
    """Largest value over the tokens of `mask`; nothing when there is no token."""
    if not mask.any():
        return {}
    return {name: Max(float(value.detach()[mask].max())) for name, value in values.items()}
