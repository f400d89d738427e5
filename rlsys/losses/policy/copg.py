"""Contrastive policy gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import group_total, row_sum, sequence_advantage
from rlsys.registry import NonNegative


@dataclass
class CoPG(Loss):
    """Scored responses of one prompt against each other, from whatever policy they come; no importance weights::

        d(y)      = sum_t(log pi - log pi_ref)           of the current policy
        R_b(y)    = R(y) - b * d(y)
        maximise    (R_{b/2}(y) - R_{b/2}(y')) * d(y) + (R_{b/2}(y') - R_{b/2}(y)) * d(y')
        gradient    (R_b(y) - R_b(y')) * (grad log pi(y) - grad log pi(y'))

    Flet-Berliac et al. 2024, equations 7 to 17. With more than two responses, the mean over the pairs of each response:
    R_b(y) minus the mean of the others. On-policy that is RLOO with the KL in the reward. The advantages must be the
    plain scores (advantage `scores`); aggregate by sequence-mean-token-sum. A group of one has no pair and no gradient.
    """

    name = "copg"
    paper = "Flet-Berliac et al. 2024, Contrastive Policy Gradient, arXiv:2406.19185"
    needs_reference = True
    needs_current = True

    coefficient: NonNegative = 0.03

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        assert inputs.reference_logprobs is not None
        assert inputs.group is not None
        counts = inputs.mask.any(1)
        distance = row_sum(inputs.logprobs - inputs.reference_logprobs, inputs.mask)[:, 0]
        regularised = sequence_advantage(inputs).double() - self.coefficient * distance.double()
        others = group_total(counts.double(), inputs.group, counts) - 1
        rest = group_total(regularised, inputs.group, counts) - regularised
        contrast = (regularised - rest / others.clamp(min=1)).where(others > 0, 0)
        return {"contrast": contrast[:, None].expand(inputs.mask.shape)}

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        contrast = inputs.extras["contrast"]
        loss = -contrast * inputs.logprobs
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, {"copg/contrast": contrast.abs()}))
