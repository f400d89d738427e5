"""No correction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Correction, LossInputs, TokenLoss


@dataclass
class NoCorrection(Correction):
    """Take ratios against the behaviour policy, as PPO does, and weigh nothing::

        w = 1

    Right as long as the sampled tokens are fresh enough for the ratio to stay within the loss's bounds.
    """

    name = "none"
    paper = "Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347"

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        return TokenLoss(torch.ones_like(inputs.logprobs))
