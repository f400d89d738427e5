"""The drift function that meta-learning found."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import Positive


@dataclass
class DiscoveredPO(Loss):
    """A smooth drift in the place of PPO's clip::

        L = -(rho * A - D)                  rho = pi / pi_prox
        D = relu((rho - 1) * A - alpha * tanh((rho - 1) * A / alpha))     A >= 0
        D = relu(log(rho) * A - beta * tanh(log(rho) * A / beta))         A < 0

    Lu et al. 2022, section 5: alpha = 2, beta = 0.6. Not to be confused with direct preference optimisation.
    """

    name = "discovered-po"
    paper = "Lu et al. 2022, Discovered Policy Optimisation, arXiv:2210.05639"
    unverified = "formula and constants recalled, not checked against the paper's text"

    alpha: Positive = 2.0
    beta: Positive = 0.6

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        advantages, difference = inputs.advantages, log_ratio(inputs)
        ratio = difference.exp()
        up, down = (ratio - 1) * advantages, difference * advantages
        drift = torch.where(
            advantages >= 0,
            torch.relu(up - self.alpha * torch.tanh(up / self.alpha)),
            torch.relu(down - self.beta * torch.tanh(down / self.beta)),
        )
        loss = -(ratio * advantages - drift)
        measured = {"policy/ratio": ratio, "policy/drift": drift, "policy/kl_k1": -difference}
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))
