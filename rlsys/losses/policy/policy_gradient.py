"""The policy gradient without clipping."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means


@dataclass
class PolicyGradient(Loss):
    """REINFORCE; nothing is clipped::

        L = -A * log pi                                        with ratio = false
        L = -A * exp(clamp(log pi - log pi_prox, -20, 20))     with ratio = true: importance weighted

    The first ignores which policy sampled the token, so it wants one update per batch or a correction; both have the
    same gradient when pi = pi_prox. Williams 1992; for language models Ahmadian et al. 2024, arXiv:2402.14740.
    """

    name = "policy-gradient"
    paper = "Williams 1992, Simple statistical gradient-following algorithms, doi:10.1007/BF00992696"

    ratio: bool = False

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        log_ratio = (inputs.logprobs - inputs.proximal_logprobs).clamp(-20, 20)
        ratio = log_ratio.exp()
        loss = -inputs.advantages * (ratio if self.ratio else inputs.logprobs)
        metrics = token_means(
            inputs.mask,
            {"policy/ratio": ratio, "policy/kl_k1": -log_ratio, "policy/kl_k3": ratio - 1 - log_ratio},
        )
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), metrics)
