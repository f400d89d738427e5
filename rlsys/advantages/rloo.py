"""Leave-one-out advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_sum, to_tokens


@dataclass
class RLOO(Estimator):
    """Score minus the mean of the *other* rollouts of the group, which makes the baseline independent of the rollout::

        A_i = r_i - sum_{j != i} r_j / (k - 1)  =  k / (k - 1) * (r_i - mean(r))
        A_i = r_i                                for a group of one

    Unscored rollouts do not count. Kool et al. 2019; for language models Ahmadian et al. 2024.
    """

    name = "rloo"
    paper = "Ahmadian et al. 2024, Back to Basics: Revisiting REINFORCE Style Optimization, arXiv:2402.14740"

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        scores = inputs.scores.double()
        others = group_sum(torch.ones_like(scores), inputs.group, inputs.scored) - 1
        total = group_sum(scores, inputs.group, inputs.scored)
        return Advantages(to_tokens(scores - (total - scores) / others.clamp(min=1), inputs.mask))
