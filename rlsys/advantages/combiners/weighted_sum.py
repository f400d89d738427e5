"""The weighted sum of the reward components."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.advantages import AdvantageInputs, Advantages, Combiner, Estimate


@dataclass
class WeightedSum(Combiner):
    """What the reward workers add up, with the weights of `rewards.functions`::

        r = sum_k weight_k * r_k

    A reward function that does not apply to the prompt's task does not count.
    """

    name = "weighted-sum"
    paper = "Roijers et al. 2013, A Survey of Multi-Objective Sequential Decision-Making, doi:10.1613/jair.3987"
    needs_components = False

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        return estimate(inputs.scores)
