"""Advantages of every reward component apart, averaged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Combiner, Estimate
from rlsys.metrics import merge


@dataclass
class PerComponent(Combiner):
    """The estimator is run on each reward component, and the advantages are averaged::

        A = mean_k A^(k),      A^(k) estimated from component k alone

    The advantage decomposition of BNPO, Xiao et al. 2025, section 4: components with little variance are not drowned by
    others. A row without a value for a component counts as 0 there. Weights of reward functions play no part.
    """

    name = "per-component"
    paper = "Xiao et al. 2025, BNPO: Beta Normalization Policy Optimization, arXiv:2506.02864"
    estimates_often = True

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        assert inputs.components is not None
        parts = [estimate(column.nan_to_num(0.0)) for column in inputs.components.unbind(1)]
        mean = torch.stack([part.advantages for part in parts]).mean(0)
        return replace(parts[0], advantages=mean, metrics=merge(part.metrics for part in parts))
