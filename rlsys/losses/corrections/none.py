"""No correction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Correction, LossInputs, TokenLoss


@dataclass
class NoCorrection(Correction):
    """w = 1, and ratios are taken against the behaviour policy: the standard PPO objective on slightly stale tokens."""

    name = "none"
    paper = "Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347"

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        return TokenLoss(torch.ones_like(inputs.logprobs))
