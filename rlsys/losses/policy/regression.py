"""Losses that regress something of the policy's onto advantages or values, for whole responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import group_mean, group_total, log_ratio, row_sum, sequence_advantage
from rlsys.registry import Positive


@dataclass
class RegGRPO(Loss):
    """Predict the advantages of a group by its log-ratios::

        d_i = sum_t(log pi - log pi_prox)          p_i = (d_i - mean(d)) / (std(d) + floor)
        L   = mean_i (A_i - p_i)^2                  population deviation of the group

    Park et al. 2025, equation 5; nothing is clipped. On-policy all d are 0 and so is their deviation, where the slope
    of p is 1 / floor: the paper says nothing of it, and a `floor` of 1 makes the first update that of plain regression.
    The gradient is exact at the current policy. Aggregate by sequence-mean-token-sum.
    """

    name = "reg-grpo"
    paper = "Park et al. 2025, DeepVideo-R1: Video Reinforcement Fine-Tuning via Regressive GRPO, arXiv:2506.07464"
    unverified = "the floor of the deviation is ours; the rule is known from a note on the paper"
    needs_current = True

    floor: Positive = 1.0

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        assert inputs.group is not None
        counts = inputs.mask.any(1)
        with torch.enable_grad():
            leaf = row_sum(log_ratio(inputs), inputs.mask)[:, 0].double().detach().requires_grad_()
            centred = torch.where(counts, leaf - group_mean(leaf, inputs.group, counts), 0)
            variance = group_mean(centred.square(), inputs.group, counts)
            # The square root has no slope at 0, where its limit along every direction is that of a deviation of 0.
            deviation = torch.where(variance > 0, variance.where(variance > 0, 1.0).sqrt(), 0.0)
            error = torch.where(counts, sequence_advantage(inputs).double() - centred / (deviation + self.floor), 0)
            (slope,) = torch.autograd.grad(error.square().sum(), leaf)
        return {
            "slope": slope[:, None].expand(inputs.mask.shape),
            "regression_error": error.square().detach()[:, None].expand(inputs.mask.shape),
        }

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        loss = inputs.extras["slope"] * inputs.logprobs
        measured = {"reg-grpo/error": inputs.extras["regression_error"], "policy/kl_k1": -log_ratio(inputs)}
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))


@dataclass
class OptimalAdvantageRegression(Loss):
    """Regress the log-ratio to the reference onto the optimal advantage; one response per prompt is enough::

        L = (beta * sum_t(log pi - log pi_ref) - A)^2          A = r - V*(x), from the advantage `optimal-value`

    Brantley et al. 2025 (A*-PO), stage 2: beta = 1e-3. No clipping, no critic. The loss of a response is divided among
    its tokens, so aggregate by sequence-mean-token-sum.

    Keep it on-policy (`driver.max_staleness: 0`, as in the preset). With so small a beta the gradient is that of
    REINFORCE with the baseline V*, which is above the mean score: most advantages are negative. On-policy that costs
    variance only. On responses of older weights, which nothing here corrects, it keeps pushing down what was sampled,
    and a policy at staleness 1 can fall apart within 50 steps.
    """

    name = "optimal-advantage-regression"
    paper = (
        "Brantley et al. 2025, Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv:2505.20686"
    )
    needs_reference = True

    beta: Positive = 1e-3

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        assert inputs.reference_logprobs is not None
        mask = inputs.mask
        distance = row_sum(inputs.logprobs - inputs.reference_logprobs, mask)
        error = self.beta * distance - sequence_advantage(inputs)[:, None]
        loss = (error.square() / mask.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape)
        measured = {
            "regression/error": error.square().expand(mask.shape),
            "reference/distance": distance.expand(mask.shape),
        }
        return TokenLoss(loss.masked_fill(~mask, 0), token_means(mask, measured))


@dataclass
class TRPA(Loss):
    """Prefer responses of a better level to those of a worse one, near the policy that sampled them::

        d_i  = mean_t(log pi - log pi_prox)                        per token, not summed
        h_ij = beta * (d_i - d_j) * (anisotropy if i is of the group's best level, else 1)     for level i above level j
        L    = mean over those pairs of  -log sigma(h_ij)

    Su et al. 2025, as in the authors' code (beta = 0.1, anisotropy = 2.5). Levels are the distinct scores of a group,
    so rewards should have few values (right and well formed, well formed, neither). The advantages must be the plain
    scores (advantage `scores`). A group of one level has no pair and no gradient; the code's single-sample loss for it
    is left out. Each group counts the same. Aggregate by sequence-mean-token-mean.
    """

    name = "trpa"
    paper = "Su et al. 2025, Trust Region Preference Approximation, arXiv:2504.04524"
    needs_current = True

    beta: Positive = 0.1
    anisotropy: Positive = 2.5

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        assert inputs.group is not None
        mask, group = inputs.mask, inputs.group
        counts = mask.any(1)
        distance = (row_sum(log_ratio(inputs), mask) / mask.sum(1, keepdim=True).clamp(min=1))[:, 0].double()
        level = sequence_advantage(inputs).double()
        same = (group[:, None] == group[None, :]) & counts[:, None] & counts[None, :]
        above = same & (level[:, None] > level[None, :] + 1e-9)
        best = torch.where(same, level[None, :], level[:, None]).amax(1) if len(level) else level
        factor = torch.where(level >= best - 1e-9, self.anisotropy, 1.0)[:, None]
        margin = self.beta * (distance[:, None] - distance[None, :]) * factor
        pull = torch.where(above, torch.sigmoid(-margin) * self.beta * factor, 0)  # minus the derivative by d_i
        pairs = group_total(above.sum(1).double(), group, counts)
        slope = (pull.sum(0) - pull.sum(1)) / pairs.clamp(min=1)
        # Aggregation divides by the rows, and the loss is a mean over the groups.
        rows_per_group = counts.sum() / max(1, len(group[counts].unique()))
        return {
            "slope": (slope * rows_per_group)[:, None].expand(mask.shape),
            "pairs": (pairs > 0).double()[:, None].expand(mask.shape),
        }

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        loss = inputs.extras["slope"] * inputs.logprobs
        measured = {"trpa/groups_with_pairs": inputs.extras["pairs"], "policy/kl_k1": -log_ratio(inputs)}
        return TokenLoss(loss.masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))
