"""Clipping that depends on the entropy of the token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import AboveOne, NonNegative, UnitInterval


@dataclass
class HeterogeneousClip(Loss):
    """Uncertain tokens may move further up, certain ones further down, and their advantages count differently::

        h in (-1, 1): entropy score of the token (extra of the adjustment `entropy-score`)
        low  <- low * (1 - scale * h)   where h <= 0          high <- high * (1 + scale * h)   where h > 0
        A_h = A * (1 + boost * h);      neutral: 1 - low / 2 < rho < 1 + high / 2
        h > 0:   A_h outside the neutral zone, A inside;        h <= 0:  A_h inside, A outside
        L = max(-A * rho, -A * clip(rho, 1 - low, 1 + high)),   L = min(L, -A * dual_clip) where A < 0

    Liu et al. 2025 (HAPO), section 3, as in the authors' code, where the neutral zone is that of the changed bounds,
    but for the sign of h: there a certain token comes out positive, against the paper's description.
    """

    name = "heterogeneous-clip"
    paper = (
        "Liu et al. 2025, From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token, arXiv:2509.16591"
    )
    needs_extras = ("entropy_score",)

    low: UnitInterval = 0.2
    high: NonNegative = 0.2
    scale: NonNegative = 1.0
    boost: NonNegative = 1.0
    dual_clip: AboveOne | None = 3.0

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        mask, score = inputs.mask, inputs.extras["entropy_score"]
        ratio = log_ratio(inputs).exp()
        low = torch.where(score <= 0, self.low * (1 - self.scale * score), self.low)
        high = torch.where(score > 0, self.high * (1 + self.scale * score), self.high)
        inside = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
        boosted = torch.where(score > 0, ~inside, inside)
        advantages = torch.where(boosted, inputs.advantages * (1 + self.boost * score), inputs.advantages)
        loss = torch.maximum(-advantages * ratio, -advantages * torch.minimum(torch.maximum(ratio, 1 - low), 1 + high))
        if self.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * self.dual_clip), loss)
        measured = {
            "hapo/boosted": boosted,
            "policy/clip_fraction_low": (advantages < 0) & (ratio < 1 - low),
            "policy/clip_fraction_high": (advantages > 0) & (ratio > 1 + high),
            "policy/ratio": ratio,
        }
        return TokenLoss(loss.masked_fill(~mask, 0), token_means(mask, measured))
