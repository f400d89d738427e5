"""Clipping bounds that keep positive tokens from being outweighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_max, token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import AboveOne, NonNegative, Positive


@dataclass
class BalancedClip(Loss):
    """Widen the clipping bounds until positive tokens contribute a target share of the update::

        e = min(rho, high) for A >= 0, max(rho, low) for A < 0
        pos = sum max(e * A, 0)     neg = sum max(-e * A, 0)     over all tokens of the update
        from the tightest bounds:  low += step  while pos / neg < target and low < low_end,
                             then  high += step  while pos / neg < target and high < high_end
        L = max(-A * rho, -A * clip(rho, low, high)),   L = min(L, -A * dual_clip) where A < 0

    Xi et al. 2025 (BAPO), algorithm 1, as in the authors' code: bounds on the ratio itself, low 0.8 to 0.95, high 1.2
    to 2, step 0.05, target 0.5; a share s of pos in pos + neg is the target s / (1 - s). Raising `low` takes negative
    tokens of small ratio out, raising `high` lets positive ones of large ratio in. The search is over every row of the
    update, on all ranks, not over a micro-batch.
    """

    name = "balanced-clip"
    paper = "Xi et al. 2025, BAPO: Balanced Policy Optimization with Adaptive Clipping, arXiv:2510.18927"
    unverified = "target is compared with pos / neg, as the code does; the README calls it the share pos / (pos + neg)"
    needs_current = True

    low_start: NonNegative = 0.8
    low_end: NonNegative = 0.95
    high_start: Positive = 1.2
    high_end: Positive = 2.0
    step: Positive = 0.05
    target: Positive = 0.5
    dual_clip: AboveOne | None = 3.0

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        ratio, advantages = log_ratio(inputs).exp().double(), inputs.advantages.double()
        low, high = self._bounds(ratio[inputs.mask], advantages[inputs.mask])
        return {"clip_low": torch.full(inputs.mask.shape, low), "clip_high": torch.full(inputs.mask.shape, high)}

    def _bounds(self, ratio: Tensor, advantages: Tensor) -> tuple[float, float]:
        positive = advantages >= 0

        def short(low: float, high: float) -> bool:
            effective = torch.where(positive, ratio.clamp(max=high), ratio.clamp(min=low)) * advantages
            return bool(effective.clamp(min=0).sum() < self.target * (-effective).clamp(min=0).sum())

        low, high = self.low_start, self.high_start
        while low < self.low_end - 1e-9 and short(low, high):
            low = min(low + self.step, self.low_end)
        while high < self.high_end - 1e-9 and short(low, high):
            high = min(high + self.step, self.high_end)
        return low, high

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        mask, advantages = inputs.mask, inputs.advantages
        low, high = inputs.extras["clip_low"], inputs.extras["clip_high"]
        ratio = log_ratio(inputs).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        if self.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * self.dual_clip), loss)
        measured = {
            "bapo/clip_low": low,
            "bapo/clip_high": high,
            "policy/clip_fraction_low": (advantages < 0) & (ratio < low),
            "policy/clip_fraction_high": (advantages > 0) & (ratio > high),
            "policy/ratio": ratio,
        }
        return TokenLoss(
            loss.masked_fill(~mask, 0), token_means(mask, measured) | token_max(mask, {"policy/ratio_max": ratio})
        )
