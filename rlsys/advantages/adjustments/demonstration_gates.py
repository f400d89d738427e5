"""When a group learns from its demonstration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.advantages.groups import group_sum
from rlsys.metrics import Mean
from rlsys.registry import UnitInterval


def solve_rates(inputs: AdvantageInputs, threshold: float) -> tuple[Tensor, Tensor]:
    """Share of the policy's own rated rollouts of each row's group above the threshold, and which rows are experts."""
    expert = torch.zeros_like(inputs.scored) if inputs.expert is None else inputs.expert
    own = inputs.scored & ~expert
    right = (inputs.scores > threshold).double()
    count = group_sum(torch.ones_like(right), inputs.group, own)
    return group_sum(right, inputs.group, own) / count.clamp(min=1), expert


@dataclass
class SolveRateSwitch(Adjustment):
    """The demonstration where the policy fails, its own rollouts elsewhere; never both::

        P = share of the policy's rollouts with a score above `threshold`
        P <= gate: train on the demonstration only;      P > gate: on the policy's rollouts only

    HPT, Lv et al. 2025, equation 9; gate = 0.
    """

    name = "solve-rate-switch"
    paper = "Lv et al. 2025, Towards a Unified View of Large Language Model Post-Training, arXiv:2509.04419"

    gate: UnitInterval = 0.0
    threshold: float = 0.5

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        rate, expert = solve_rates(inputs, self.threshold)
        failed = rate <= self.gate
        kept = torch.where(expert, failed, ~failed)
        mask = inputs.mask & kept[:, None]
        metrics = {"hpt/failed": Mean(float(failed[expert].sum()), float(expert.sum()))}
        return replace(advantages, advantages=advantages.advantages * mask, mask=mask, metrics=metrics)


@dataclass
class DemonstrationIfUnsolved(Adjustment):
    """Demonstrations count only where no rollout of the policy is right::

        a demonstration is trained on  <=>  no score of its group's own rollouts is above `threshold`

    AMPO, Yuan et al. 2025, section 3.1, puts them in the place of wrong rollouts there; here they come in addition.
    """

    name = "demonstration-if-unsolved"
    paper = "Yuan et al. 2025, More Than One Teacher: Adaptive Multi-Guidance Policy Optimization, arXiv:2510.02227"

    threshold: float = 0.5

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        rate, expert = solve_rates(inputs, self.threshold)
        mask = inputs.mask & ~(expert & (rate > 0))[:, None]
        metrics = {"ampo/guided": Mean(float((expert & (rate <= 0)).sum()), float(expert.sum()))}
        return replace(advantages, advantages=advantages.advantages * mask, mask=mask, metrics=metrics)
