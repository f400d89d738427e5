"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.losses import TokenLoss
from rlsys.losses.measure import token_means


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> TokenLoss:
    """Squared error to the returns, clipped like the policy; all tensors [B, T], only `values` carries a gradient::

        V_clip = clip(V, V_old - clip, V_old + clip)
        L = max((V - R)^2, (V_clip - R)^2) / 2

    `clip=None`: L = (V - R)^2 / 2. From the reference implementation of Schulman et al. 2017, arXiv:1707.06347; see
    Huang et al. 2022, The 37 Implementation Details of PPO, detail 9.
    """
    error = (values - returns).square()
    measured = {"critic/value": values, "critic/return": returns, "critic/error": error}
    if clip is not None:
        bounded = values.clamp(old_values - clip, old_values + clip)
        bounded_error = (bounded - returns).square()
        measured["critic/clip_fraction"] = bounded_error > error
        loss = torch.maximum(error, bounded_error) / 2
    else:
        loss = error / 2
    return TokenLoss(loss.masked_fill(~mask, 0), token_means(mask, measured))
