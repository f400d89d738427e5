"""Mirror descent: a KL to the old policy that gets stronger."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import Positive


@dataclass
class MirrorDescent(Loss):
    """Importance-weighted advantages and a proximity term instead of a clip::

        L   = -rho * A + KL / t_k           rho = pi / pi_prox
        KL  = rho * log rho - (rho - 1)     of the sampled token: unbiased for KL(pi || pi_prox), never negative
        t_k = step_size * max(1 - k / K, smallest)       k: this step of K

    Tomar et al. 2020, equation 12, on-policy. At the first update of a step the gradient of the KL is zero, so it needs
    several (`algorithm.epochs`; the paper has 10). t_k falls, so the steps get smaller.
    """

    name = "mirror-descent"
    paper = "Tomar et al. 2020, Mirror Descent Policy Optimization, arXiv:2005.09814"
    unverified = "written from the paper's abstract and general knowledge; the KL is estimated from the sampled token"

    step_size: Positive = 1.0
    anneal: bool = True
    smallest: Positive = 0.01

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        difference = log_ratio(inputs)
        ratio = difference.exp()
        left = max(1 - inputs.progress.fraction, self.smallest) if self.anneal else 1.0
        kl = ratio * difference - (ratio - 1)
        loss = -inputs.advantages * ratio + kl / (self.step_size * left)
        measured = {"policy/ratio": ratio, "policy/kl_proximal": kl}
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))
