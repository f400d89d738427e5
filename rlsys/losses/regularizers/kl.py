"""The KL divergence to the reference policy, estimated on the sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlsys.losses import LossInputs, Regularizer, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.metrics import Last
from rlsys.registry import NonNegative


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2."""
    return (logprobs - reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """pi_ref / pi - 1 - log(pi_ref / pi), with the log-ratio clamped to 20 and the result to 10 either way."""
    log_ratio = (reference_logprobs - logprobs).clamp(-20, 20)
    return (log_ratio.exp() - 1 - log_ratio).clamp(-10, 10)


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass
class KL(Regularizer):
    """Keep the policy near the reference: an estimate of KL(pi || pi_ref) from the sampled tokens::

        d = log pi - log pi_ref
        k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d
        L = coefficient * k

    As a loss term the gradient is that of the current policy. On-policy, k1's is zero on average (it only adds noise),
    k2's is that of KL(pi || pi_ref), k3's is that of KL(pi_ref || pi). As values, k1 and k3 are unbiased for
    KL(pi || pi_ref). With `in_reward`, `-coefficient * k(pi_behav, pi_ref)` is added to each token's reward
    instead, so that it passes through the advantage estimator (k1: Ziegler et al. 2019). k3 as a loss is GRPO's,
    arXiv:2402.03300, equation 4 (coefficient 0.04). A coefficient of 0 only measures. With `final`, the coefficient
    moves in a straight line from `coefficient` at the first step to `final` at the last (in the loss only). Where an
    adjustment leaves the extra `kl_scale` (`difficulty-kl`), the term in the loss is multiplied by it, token by token.
    """

    name = "kl"
    paper = "Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html"
    needs_reference = True

    coefficient: NonNegative = 0.001
    estimator: Literal["k1", "k2", "k3"] = "k3"
    in_reward: bool = False
    final: NonNegative | None = None

    def __post_init__(self) -> None:
        if self.in_reward and self.final is not None:
            raise ValueError("final is for the loss: with in_reward the coefficient does not change")

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        assert inputs.reference_logprobs is not None
        kl = ESTIMATORS[self.estimator](inputs.logprobs, inputs.reference_logprobs)
        metrics = token_means(inputs.mask, {f"reference/kl_{self.estimator}": kl})
        coefficient = self.coefficient
        if self.final is not None:
            coefficient += (self.final - self.coefficient) * inputs.progress.fraction
            metrics["reference/kl_coefficient"] = Last(coefficient)
        if "kl_scale" in inputs.extras:
            kl = kl * inputs.extras["kl_scale"]
        return TokenLoss((coefficient * kl).masked_fill(~inputs.mask, 0), metrics)

    def reward(self, behavior_logprobs: Tensor, reference_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        assert reference_logprobs is not None
        kl = ESTIMATORS[self.estimator](behavior_logprobs, reference_logprobs)
        return (-self.coefficient * kl).masked_fill(~mask, 0)
