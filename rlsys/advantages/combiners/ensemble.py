"""Ensembles of reward models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rlsys.advantages import AdvantageInputs, Advantages, Combiner, Estimate
from rlsys.errors import LearnerError
from rlsys.metrics import Mean, merge
from rlsys.registry import NonNegative


def component(inputs: AdvantageInputs, name: str, part: str) -> Tensor:
    """The values [B] of one reward function, float64; 0 where it has none. Raises LearnerError when there is none."""
    if inputs.components is None or name not in inputs.component_names:
        have = ", ".join(inputs.component_names) or "none"
        raise LearnerError(
            f"{part}: no reward component {name!r} came with the batch; there are {have}. Add a function of that name "
            "to rewards.functions, or change the option"
        )
    return inputs.components[:, inputs.component_names.index(name)].nan_to_num(0.0).double()


@dataclass
class Ensemble(Combiner):
    """Several reward models that say the same thing, believed as far as they agree::

        r_k <- (r_k - mean_k) / std_k                      on a common calibration set, given as options
        mean         r = mean_k r_k
        worst        r = min_k r_k
        uncertainty  r = mean_k r_k - penalty * var_k r_k          population variance

    Coste et al. 2023: k = 5, penalty = 0.1 for PPO and 0.5 for best-of-n. Without a common scale the minimum means
    nothing, so give `mean` and `std` by component. `components` are the members; empty: all there are.
    """

    name = "ensemble"
    paper = "Coste et al. 2023, Reward Model Ensembles Help Mitigate Overoptimization, arXiv:2310.02743"

    method: Literal["mean", "worst", "uncertainty"] = "mean"
    penalty: NonNegative = 0.1
    components: tuple[str, ...] = ()
    mean: Mapping[str, float] = field(default_factory=dict)
    std: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        members = self.components or inputs.component_names
        values = torch.stack(
            [(component(inputs, m, self.name) - self.mean.get(m, 0.0)) / self.std.get(m, 1.0) for m in members], 1
        )
        spread = values.var(1, unbiased=False)
        if self.method == "worst":
            scores = values.amin(1)
        else:
            scores = values.mean(1) - (self.penalty * spread if self.method == "uncertainty" else 0)
        out = estimate(scores)
        counted = float(inputs.scored.sum())
        metrics = {"ensemble/variance": Mean(float(spread[inputs.scored].sum()), counted)}
        return replace(out, metrics=merge([out.metrics, metrics]))
