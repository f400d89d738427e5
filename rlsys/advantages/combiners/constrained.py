"""Rewards under constraints, by Lagrange multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Combiner, Estimate
from rlsys.advantages.combiners.ensemble import component
from rlsys.errors import LearnerError
from rlsys.metrics import Last, Metric, merge
from rlsys.registry import NonNegative, Positive


def standardised(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit deviation over the trained tokens; 0 where all are equal."""
    if not mask.any():
        return advantages * 0
    chosen = advantages[mask].double()
    deviation = chosen.std(unbiased=False)
    if deviation < 1e-8:
        return advantages * 0
    return ((advantages.double() - chosen.mean()) / deviation * mask).float()


@dataclass
class Constrained(Combiner):
    """Each component is wanted up to its threshold, and no further::

        weight_k = sigmoid(x_k)    inequality (xi-PPO): it goes to 0 beyond the threshold
        weight_k = tanh(x_k)       equality (mu-PPO): it turns negative beyond the threshold
        A = (N - sum_k weight_k) * A_KL + sum_k weight_k * A_k       each part standardised over the batch
        A = A_KL + sum_k weight_k * A_k                              kl_weight = one
        x_k <- x_k - rate * velocity,  velocity <- momentum * velocity + weight'(x_k) * (mean r_k - threshold_k)

    Moskovitz et al. 2023, as in the authors' code: N components, rate = 0.01, momentum = 0.1, x near 0 at the start.
    A_k is estimated from component k alone, A_KL from the penalties of the regularisers in the reward alone (give one).
    The paper has a value head for each component; with an estimator of groups none is needed.
    """

    name = "constrained"
    paper = "Moskovitz et al. 2023, Confronting Reward Model Overoptimization with Constrained RLHF, arXiv:2310.04373"
    estimates_often = True

    thresholds: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["inequality", "equality"] = "inequality"
    kl_weight: Literal["rest", "one"] = "rest"
    rate: Positive = 0.01
    momentum: NonNegative = 0.1
    multipliers: dict[str, float] = field(default_factory=dict, init=False)
    velocity: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        thresholds = dict(self.thresholds) or dict.fromkeys(inputs.component_names, 1.0)
        if not thresholds:
            raise LearnerError(
                f"{self.name}: no reward component came with the batch; name functions in rewards.functions"
            )
        weights = {name: self._squash(self.multipliers.get(name, 0.0)) for name in thresholds}
        penalties = estimate(torch.zeros_like(inputs.scores))
        mask = inputs.mask
        rest = len(weights) - sum(weights.values()) if self.kl_weight == "rest" else 1.0
        total = rest * standardised(penalties.advantages, mask)
        parts = [penalties.metrics]
        metrics: dict[str, Metric] = {}
        for name, threshold in thresholds.items():
            values = component(inputs, name, self.name)
            found = estimate(values, penalties=False)
            total = total + weights[name] * standardised(found.advantages, mask)
            metrics[f"constrained/weight_{name}"] = Last(weights[name])
            if inputs.scored.any():
                mean = float(values[inputs.scored].mean())
                metrics[f"constrained/violation_{name}"] = Last(threshold - mean)
                self._descend(name, mean - threshold)
        return replace(penalties, advantages=total, metrics=merge([*parts, metrics]))

    def _squash(self, x: float) -> float:
        return 1 / (1 + math.exp(-x)) if self.kind == "inequality" else math.tanh(x)

    def _descend(self, name: str, excess: float) -> None:
        x = self.multipliers.get(name, 0.0)
        weight = self._squash(x)
        slope = weight * (1 - weight) if self.kind == "inequality" else 1 - weight**2
        self.velocity[name] = self.momentum * self.velocity.get(name, 0.0) + slope * excess
        self.multipliers[name] = x - self.rate * self.velocity[name]

    def state_dict(self) -> dict[str, Any]:
        return {"multipliers": dict(self.multipliers), "velocity": dict(self.velocity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multipliers, self.velocity = dict(state["multipliers"]), dict(state["velocity"])
