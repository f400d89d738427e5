"""Group-relative REINFORCE with a mask instead of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import NonNegative, UnitInterval


@dataclass
class REC(Loss):
    """Tokens outside a band of ratios are left out; the others are weighted by their ratio, or not at all::

        L = -M * rho * A              importance = true;  the gradient of PPO's clip, with side = one
        L = -M * A * log pi           importance = false: rho is in the mask only
        M = 1[A > 0, rho <= 1 + high] + 1[A < 0, rho >= 1 - low]        side = one
        M = 1[1 - low <= rho <= 1 + high]                               side = two
        M = that, or A > 0 and rho < 1 - outer_low, or A < 0 and rho > 1 + outer_high      side = ring

    Yao et al. 2025, section 4: why group-relative REINFORCE works off-policy. In ring the tokens far outside are let in
    again where the update brings them back.
    """

    name = "rec"
    paper = "Yao et al. 2025, Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm, arXiv:2509.24203"
    unverified = "the outer band of side = ring, known from option names and a summary of the paper"

    side: Literal["one", "two", "ring"] = "one"
    importance: bool = False
    low: UnitInterval = 0.2
    high: NonNegative = 0.2
    outer_low: UnitInterval = 0.6
    outer_high: NonNegative = 2.0

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        advantages, ratio = inputs.advantages, log_ratio(inputs).exp()
        kept = self._kept(advantages, ratio.detach())
        loss = -advantages * (ratio if self.importance else inputs.logprobs)
        measured = {"policy/left_out": ~kept, "policy/ratio": ratio}
        return TokenLoss(loss.masked_fill(~inputs.mask | ~kept, 0), token_means(inputs.mask, measured))

    def _kept(self, advantages: Tensor, ratio: Tensor) -> Tensor:
        below, above = ratio < 1 - self.low, ratio > 1 + self.high
        if self.side == "one":
            return torch.where(advantages > 0, ~above, ~below)
        kept = ~below & ~above
        if self.side == "ring":
            kept |= (advantages > 0) & (ratio < 1 - self.outer_low)
            kept |= (advantages < 0) & (ratio > 1 + self.outer_high)
        return kept
