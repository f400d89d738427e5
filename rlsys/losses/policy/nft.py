"""Negative-aware fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import NonNegative


@dataclass
class NFT(Loss):
    """Maximum likelihood on right answers, and on wrong ones through the policy that they imply::

        R = pi / pi_prox of the token,  r = solve rate of the prompt,  w = weight of the prompt
        right answer   L = -w * log R
        wrong answer   L = -w * negative * log(max((1 - r * R) / (1 - r), floor))      straight-through: the gradient of
                                                                                the unclamped value, at the clamped one

    Chen et al. 2025, equations 8 to 11, as in the authors' code (floor = 1, negative = 1; negative = 0 trains on right
    answers only). On-policy the gradient is that of GRPO: with w = 1 - r of the mean-centred advantages, with
    w = sqrt((1 - r) / r) of those over the population deviation. Solve rate, weight and correctness come from the
    advantage `solve-rate`.
    """

    name = "nft"
    paper = (
        "Chen et al. 2025, Bridging Supervised Learning and Reinforcement Learning in Math Reasoning, arXiv:2505.18116"
    )
    needs_extras = ("solve_rate", "prompt_weight", "right")

    floor: NonNegative = 1.0
    negative: NonNegative = 1.0

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        rate, weight, right = (inputs.extras[name] for name in self.needs_extras)
        difference = log_ratio(inputs)
        implied = (1 - rate * difference.exp()) / (1 - rate).clamp(min=1e-6)
        clamped = implied + (implied.clamp(min=self.floor) - implied).detach()
        wrong = -self.negative * clamped.clamp(min=1e-12).log()
        loss = weight * torch.where(right > 0, -difference, wrong)
        measured = {
            "policy/ratio": difference.exp(),
            "nft/implied_ratio_clamped": (right <= 0) & (implied < self.floor),
            "nft/right": right,
        }
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))
