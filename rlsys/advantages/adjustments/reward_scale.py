"""PPO-max: bounded, normalised rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Mean
from rlsys.registry import Positive


@dataclass
class ClipAdvantages(Adjustment):
    """No advantage beyond a bound::

        A <- clip(A, -bound, bound)

    Zheng et al. 2023 (PPO-max), section 4, bound = 0.5 after whitening.
    """

    name = "clip-advantages"
    paper = "Zheng et al. 2023, Secrets of RLHF in Large Language Models Part I: PPO, arXiv:2307.04964"

    bound: Positive = 0.5

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        given = advantages.advantages
        clipped = given.clamp(-self.bound, self.bound)
        count = float((clipped != given)[inputs.mask].sum())
        metrics = {"ppo-max/advantages_clipped": Mean(count, float(inputs.mask.sum()))}
        return replace(advantages, advantages=clipped, metrics=metrics)
