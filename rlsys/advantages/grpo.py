"""Group-relative advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.registry import NonNegative


@dataclass
class GRPO(Estimator):
    """Score minus the mean of the group, over its standard deviation; the same for every token of a response::

        A_i = (r_i - mean(r)) / (std(r) + eps)      std unbiased (n - 1)
        A_i = r_i - mean(r)                         with std = false: Dr. GRPO, arXiv:2503.20783
        A_i = r_i                                   for a group of one
        A_i + shift                                 a baseline that is lower by `shift`: AsymRE, arXiv:2509.24203

    DeepSeekMath, section 4.1.2. Unscored rollouts count neither in the mean nor in the deviation.
    """

    name = "grpo"
    paper = "Shao et al. 2024, DeepSeekMath, arXiv:2402.03300"

    std: bool = True
    eps: NonNegative = 1e-6
    shift: float = 0.0

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        count, mean, std = group_statistics(inputs.scores, inputs.group, inputs.scored)
        advantages = inputs.scores - mean
        if self.std:
            # With eps = 0 a group of equal scores would be 0 / 0.
            advantages = torch.where(std > 0, advantages / (std + self.eps), 0)
        advantages = torch.where(count == 1, inputs.scores.double(), advantages)
        return Advantages(to_tokens(advantages + self.shift, inputs.mask))
