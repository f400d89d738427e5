"""Clipped importance weights instead of clipped updates."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import NonNegative, UnitInterval


@dataclass
class CISPO(Loss):
    """REINFORCE with a bounded importance weight: no token's gradient is ever dropped, only its weight is capped::

        L = -sg(clip(rho, 1 - low, 1 + high)) * A * log pi        rho = pi / pi_prox

    MiniMax-M1, equations 4 and 5, where there is no lower bound (low = 1) and the upper one is tuned.
    """

    name = "cispo"
    paper = "MiniMax 2025, MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention, arXiv:2506.13585"
    unverified = "the paper gives no number for the upper bound; 4 (a ratio of 5) is that of later large-scale studies"

    low: UnitInterval = 1.0
    high: NonNegative = 4.0

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        ratio = log_ratio(inputs).exp().detach()
        weight = ratio.clamp(1 - self.low, 1 + self.high)
        loss = -weight * inputs.advantages * inputs.logprobs
        measured = {"policy/ratio": ratio, "policy/weights_capped": ratio != weight, "policy/kl_k1": -log_ratio(inputs)}
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))
