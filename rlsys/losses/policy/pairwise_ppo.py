"""PPO on pairs of responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import group_total, log_ratio, row_sum, sequence_advantage
from rlsys.registry import UnitInterval


@dataclass
class PairwisePPO(Loss):
    """The policy gradient of differences of rewards, with ratios of whole responses, clipped::

        on-policy   (r(y1) - r(y2)) / 2 * grad(log pi(y1) - log pi(y2))
        separate    sum over the two of  min(rho_i * a_i, clip(rho_i) * a_i),  a_1 = (r1 - r2) / 2 = -a_2
        joint       min(u * a_1, clip(u) * a_1),  u = rho_1 / rho_2
        rho_i = exp(sum_t(log pi - log pi_prox)),  clip to (1 - clip, 1 + clip)

    Wu et al. 2023 (V1 is separate, V2 joint). Rewards may be shifted by anything that depends on the prompt alone. Of a
    group of more than two, every pair counts, divided by the pairs of one response. The advantages must be the plain
    rewards with the KL to the reference in them (advantage `scores`); aggregate by sequence-mean-token-sum.
    """

    name = "pairwise-ppo"
    paper = "Wu et al. 2023, Pairwise Proximal Policy Optimization: Harnessing Relative Feedback, arXiv:2310.00212"
    unverified = "the exact clipped objectives, known from digests of the paper; clip = 0.2 is recalled"
    needs_current = True

    ratios: Literal["separate", "joint"] = "joint"
    clip: UnitInterval = 0.2

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        """The derivative of the objective by each response's log-prob, exact at the current policy."""
        assert inputs.group is not None
        counts = inputs.mask.any(1)
        distance = row_sum(log_ratio(inputs), inputs.mask)[:, 0].double().clamp(-20, 20)
        rewards = sequence_advantage(inputs).double()
        same = (inputs.group[:, None] == inputs.group[None, :]) & counts[:, None] & counts[None, :]
        same.fill_diagonal_(False)
        half = (rewards[:, None] - rewards[None, :]) / 2  # [B, B], a_1 of the pair (row, column)
        if self.ratios == "separate":
            ratio = distance.exp()[:, None].expand_as(half)
        else:
            ratio = (distance[:, None] - distance[None, :]).clamp(-20, 20).exp()
        # min(ratio * a, clip(ratio) * a) has no gradient where the clip has taken over
        free = torch.where(half > 0, ratio <= 1 + self.clip, ratio >= 1 - self.clip)
        slope = torch.where(same & free, ratio * half, 0)
        if self.ratios == "joint":  # each unordered pair stands here twice, with u and 1 / u: take it once for each row
            slope = (slope - slope.T) / 2
        pairs = group_total(counts.double(), inputs.group, counts) - 1
        total = slope.sum(1) / pairs.clamp(min=1)
        return {"slope": total[:, None].expand(inputs.mask.shape)}

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        slope = inputs.extras["slope"]
        loss = -slope * inputs.logprobs
        measured = {"pairwise/slope": slope.abs(), "policy/kl_k1": -log_ratio(inputs)}
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))
