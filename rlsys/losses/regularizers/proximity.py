"""Stay near the policy that sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlsys.losses import LossInputs, Regularizer, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.regularizers.kl import ESTIMATORS
from rlsys.registry import NonNegative


@dataclass
class Proximity(Regularizer):
    """A penalty on the distance to the policy that ratios are taken against; no reference model is needed::

        d = log pi - log pi_prox
        L = coefficient * k(d)          k1 = d    k2 = d^2 / 2    k3 = exp(-d) - 1 + d

    With k2 and the policy gradient it is OPMD (coefficient 0.1 there), in the token form of Trinity-RFT.
    """

    name = "proximity"
    paper = "Yao et al. 2025, Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm, arXiv:2509.24203"

    coefficient: NonNegative = 0.1
    estimator: Literal["k1", "k2", "k3"] = "k2"

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        distance = ESTIMATORS[self.estimator](inputs.logprobs, inputs.proximal_logprobs)
        metrics = token_means(inputs.mask, {f"policy/proximity_{self.estimator}": distance})
        return TokenLoss((self.coefficient * distance).masked_fill(~inputs.mask, 0), metrics)
