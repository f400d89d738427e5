"""Entropy kept by restraining the tokens whose log-prob and advantage covary most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import NonNegative, UnitInterval


def covariance(inputs: LossInputs) -> Tensor:
    """(log pi - its mean) * (A - its mean) of each token [B, T], means over all trained tokens; 0 where masked."""
    mask = inputs.mask
    count = mask.sum().clamp(min=1)
    logprobs, advantages = inputs.logprobs.masked_fill(~mask, 0), inputs.advantages.masked_fill(~mask, 0)
    product = (logprobs - logprobs.sum() / count) * (advantages - advantages.sum() / count)
    return product.masked_fill(~mask, 0)


def chosen(inputs: LossInputs, places: Tensor) -> Tensor:
    """float [B, T] with 1 at the given flat places."""
    out = torch.zeros(inputs.mask.numel())
    out[places] = 1.0
    return out.reshape(inputs.mask.shape)


@dataclass
class ClipCov(Loss):
    """A few tokens of high covariance, drawn at random, get no gradient; the others PPO's clipped ratio::

        cov_t = (log pi_t - mean(log pi)) * (A_t - mean(A))
        no gradient for  fraction * N  tokens drawn from  {t: lowest < cov_t < highest, inside the clipping bounds}
        L = max(-A * rho, -A * clip(rho, 1 - low, 1 + high))   for the others

    Cui et al. 2025, section 4.2: the entropy falls by the covariance of log-prob and action value, which few tokens
    carry. N is all tokens of the update. The draw is seeded by step and update, so that a resumed run repeats it.
    """

    name = "clip-cov"
    paper = "Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning Models, arXiv:2505.22617"
    needs_current = True

    fraction: UnitInterval = 2e-4
    lowest: NonNegative = 1.0
    highest: NonNegative = 5.0
    low: UnitInterval = 0.2
    high: NonNegative = 0.2
    updates: int = field(default=0, init=False)

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        self.updates += 1
        cov = covariance(inputs)
        ratio = log_ratio(inputs).exp()
        inside = (ratio >= 1 - self.low) & (ratio <= 1 + self.high)
        candidates = torch.nonzero((inputs.mask & inside & (cov > self.lowest) & (cov < self.highest)).flatten())[:, 0]
        count = min(len(candidates), max(1, int(self.fraction * int(inputs.mask.sum()))))
        generator = torch.Generator().manual_seed(self.updates)
        drawn = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        return {"held": chosen(inputs, drawn)}

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        mask, advantages, held = inputs.mask, inputs.advantages, inputs.extras["held"] > 0
        ratio = log_ratio(inputs).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - self.low, 1 + self.high))
        measured = {
            "policy/held_by_covariance": held,
            "policy/clip_fraction_low": (advantages < 0) & (ratio < 1 - self.low),
            "policy/clip_fraction_high": (advantages > 0) & (ratio > 1 + self.high),
            "policy/ratio": ratio,
        }
        return TokenLoss(loss.masked_fill(~mask | held, 0), token_means(mask, measured))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]


@dataclass
class KLCov(Loss):
    """The tokens of highest covariance pay for moving away from the policy that sampled them::

        cov_t = (log pi_t - mean(log pi)) * (A_t - mean(A))
        L = -A * rho + coefficient * |log rho|    for the fraction * N tokens of largest cov
        L = -A * rho                              for the others

    Cui et al. 2025, section 4.2, as in the authors' code; nothing is clipped. N is all tokens of the update.
    """

    name = "kl-cov"
    paper = "Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning Models, arXiv:2505.22617"
    needs_current = True

    fraction: UnitInterval = 2e-4
    coefficient: NonNegative = 1.0

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        tokens = int(inputs.mask.sum())
        count = min(tokens, max(1, int(self.fraction * tokens)))
        ranked = covariance(inputs).masked_fill(~inputs.mask, -torch.inf).flatten()
        return {"penalised": chosen(inputs, ranked.topk(count).indices)}

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        difference = log_ratio(inputs)
        ratio, penalised = difference.exp(), inputs.extras["penalised"]
        loss = -inputs.advantages * ratio + self.coefficient * penalised * difference.abs()
        measured = {"policy/penalised_by_covariance": penalised, "policy/ratio": ratio, "policy/kl_k1": -difference}
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))
