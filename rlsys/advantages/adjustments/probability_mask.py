"""No training on tokens that were all but certain."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Mean
from rlsys.registry import UnitInterval


@dataclass
class ProbabilityMask(Adjustment):
    """Only tokens of which the policy was not sure when it sampled them::

        trained: pi_old(y_t) < threshold

    Guo et al. 2025 (SPO): threshold = 0.9. The others count neither in the loss nor in its normaliser, nor in whatever
    adjustment comes after this one (such as `whiten`).
    """

    name = "probability-mask"
    paper = "Guo et al. 2025, Segment Policy Optimization, arXiv:2505.23564"

    threshold: UnitInterval = 0.9

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        kept = inputs.mask & (inputs.behavior_logprobs.exp() < self.threshold)
        count = float(inputs.mask.sum())
        return replace(
            advantages,
            advantages=advantages.advantages * kept,
            mask=kept,
            metrics={"segments/tokens_too_sure": Mean(count - float(kept.sum()), count)},
        )
