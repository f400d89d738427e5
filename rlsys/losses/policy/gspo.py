"""Sequence-level importance ratios."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_max, token_means
from rlsys.losses.sequences import log_ratio, row_mean
from rlsys.registry import NonNegative, UnitInterval


@dataclass
class GSPO(Loss):
    """The ratio of a whole response, length-normalised, clipped as one; its gradient goes to all tokens alike::

        s_i   = exp(mean_t(log pi - log pi_prox))
        s_it  = sg(s_i) * pi / sg(pi)                  value s_i, gradient of the token
        L     = max(-A * s_it, -A * clip(s_it, 1 - low, 1 + high))

    Zheng et al. 2025, equations 5 to 7 (GSPO-token with equal advantages is GSPO). The bounds are far smaller than
    those of tokens: 3e-4 and 4e-4. Aggregate by sequence-mean-token-mean.
    """

    name = "gspo"
    paper = "Zheng et al. 2025, Group Sequence Policy Optimization, arXiv:2507.18071"

    low: UnitInterval = 3e-4
    high: NonNegative = 4e-4

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        mask, advantages = inputs.mask, inputs.advantages
        sequence = row_mean(log_ratio(inputs), mask).detach()
        ratio = (sequence + inputs.logprobs - inputs.logprobs.detach()).clamp(max=10.0).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - self.low, 1 + self.high))
        measured = {
            "policy/clip_fraction_low": (advantages < 0) & (ratio < 1 - self.low),
            "policy/clip_fraction_high": (advantages > 0) & (ratio > 1 + self.high),
            "policy/sequence_ratio": ratio,
            "policy/kl_k1": -log_ratio(inputs),
        }
        metrics = token_means(mask, measured) | token_max(mask, {"policy/sequence_ratio_max": ratio})
        return TokenLoss(loss.masked_fill(~mask, 0), metrics)
