"""The clipped surrogate of PPO, with separate bounds and dual clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_max, token_means
from rlsys.registry import AboveOne, NonNegative, UnitInterval


@dataclass
class PPOClip(Loss):
    """Clipped policy ratio, pessimistic: moving further than the bounds gains nothing.

    With rho = exp(clamp(log pi - log pi_prox, -20, 20)), where pi_prox is the behaviour policy unless a correction asks
    for another one::

        L = max(-A * rho, -A * clip(rho, 1 - low, 1 + high))
        L = min(L, -A * dual_clip)      where A < 0, if dual_clip is given

    Schulman et al. 2017, equation 7 (low = high = 0.2). A larger `high` ("clip higher") is DAPO, arXiv:2503.14476,
    equation 10 (0.2, 0.28). Dual clip is Ye et al. 2020, arXiv:1912.09729 (dual_clip = 3).
    """

    name = "ppo-clip"
    paper = "Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347"

    low: UnitInterval = 0.2
    high: NonNegative = 0.2
    dual_clip: AboveOne | None = None

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        mask, advantages = inputs.mask, inputs.advantages
        log_ratio = (inputs.logprobs - inputs.proximal_logprobs).clamp(-20, 20)
        ratio = log_ratio.exp()
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.low, 1 + self.high)
        loss = torch.maximum(plain, clipped)
        measured = {
            "policy/clip_fraction_low": (advantages < 0) & (ratio < 1 - self.low),
            "policy/clip_fraction_high": (advantages > 0) & (ratio > 1 + self.high),
            "policy/ratio": ratio,
            "policy/kl_k1": -log_ratio,
            "policy/kl_k3": ratio - 1 - log_ratio,
        }
        if self.dual_clip is not None:
            bound = -advantages * self.dual_clip
            over = (advantages < 0) & (loss > bound)
            loss = torch.where(over, bound, loss)
            measured["policy/clip_fraction_dual"] = over
        metrics = token_means(mask, measured) | token_max(mask, {"policy/ratio_max": ratio})
        return TokenLoss(loss.masked_fill(~mask, 0), metrics)
