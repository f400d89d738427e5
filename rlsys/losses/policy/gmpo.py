"""The geometric mean of token ratios."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio, row_mean, sequence_advantage
from rlsys.registry import NonNegative


@dataclass
class GMPO(Loss):
    """Maximise the geometric mean of the token rewards of a response, which single large ratios move little::

        l_t = log pi - log pi_prox
        l_t <- min(l_t, clip(l_t, -low, high))    for A > 0;   max(...)  for A < 0
        L   = -A * exp(mean_t l_t)                 of a response, on each of its tokens

    Zhao et al. 2025, equation 4, with its clipping of log-ratios to (-0.4, 0.4) by token. Aggregate by
    sequence-mean-token-mean, which gives each response its own loss once.
    """

    name = "gmpo"
    paper = "Zhao et al. 2025, Geometric-Mean Policy Optimization, arXiv:2507.20673"

    low: NonNegative = 0.4
    high: NonNegative = 0.4

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        mask = inputs.mask
        advantage = sequence_advantage(inputs)[:, None]
        raw = log_ratio(inputs)
        bounded = raw.clamp(-self.low, self.high)
        kept = torch.where(advantage > 0, torch.minimum(raw, bounded), torch.maximum(raw, bounded))
        ratio = row_mean(kept, mask).exp()
        loss = (-advantage * ratio).expand(mask.shape)
        measured = {"policy/clip_fraction": kept != raw, "policy/sequence_ratio": ratio.expand(mask.shape)}
        return TokenLoss(loss.masked_fill(~mask, 0), token_means(mask, measured))
