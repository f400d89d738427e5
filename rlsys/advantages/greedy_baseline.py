"""The greedy response as baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_sum
from rlsys.advantages.return_to_go import returns_to_go
from rlsys.metrics import Mean
from rlsys.registry import Positive, UnitInterval


@dataclass
class GreedyBaseline(Estimator):
    """Returns to go over what the most likely response of the same prompt would have got::

        A_t = sum_{s >= t} gamma^(s - t) * r_s - r(greedy)      scores clipped to (-clip, clip)

    ReMax, Li et al. 2023, section 4, as in the authors' code: the KL is a cost of tokens, and not in the baseline;
    clip = 5. The greedy response is often better than the mean, and most advantages then negative, which is unbiased
    on-policy only: keep `driver.max_staleness: 0`. One more response of every prompt is sampled, at temperature 0, and
    never trained on. Where that one has no score, the prompt is left out.
    """

    name = "greedy-baseline"
    paper = "Li et al. 2023, ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method, arXiv:2310.10505"
    needs_greedy = True

    gamma: UnitInterval = 1.0
    clip: Positive = 5.0

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        greedy = torch.zeros_like(inputs.scored) if inputs.greedy is None else inputs.greedy
        count = group_sum(torch.ones_like(inputs.scores), inputs.group, greedy)
        total = group_sum(inputs.scores.clamp(-self.clip, self.clip), inputs.group, greedy)
        # the score is the last token reward, KL penalties the rest
        excess = inputs.scores - inputs.scores.clamp(-self.clip, self.clip)
        returns = returns_to_go(inputs.token_rewards * inputs.scored[:, None], inputs.mask, self.gamma)
        last = inputs.mask.shape[1] - 1 - inputs.mask.flip(1).int().argmax(1)
        steps_to_last = (last[:, None] - torch.arange(inputs.mask.shape[1])).clamp(min=0)
        clipped = returns - excess[:, None].double() * torch.tensor(self.gamma).double() ** steps_to_last
        mask = inputs.mask & (count > 0)[:, None]
        advantages = torch.where(mask, clipped - (total / count.clamp(min=1))[:, None], 0).float()
        metrics = {"remax/greedy_score": Mean(float(inputs.scores[greedy].sum()), float(greedy.sum()))}
        return Advantages(advantages, metrics=metrics, mask=mask)
