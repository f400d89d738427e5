"""Weights of several objectives that follow the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Combiner, Estimate
from rlsys.advantages.combiners.ensemble import component
from rlsys.metrics import Last, Metric, merge
from rlsys.registry import NonNegative, Positive

PAPER = (
    "Lu et al. 2025, Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting, arXiv:2509.11452"
)


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume that is better than the reference and not better than some point, larger being better.

    By exclusive volumes: each point adds its box less what later points cover of it (While et al. 2012).
    """
    volume = 0.0
    for place, point in enumerate(points):
        box = math.prod(max(0.0, x - r) for x, r in zip(point, reference, strict=True))
        limited = [[min(a, b) for a, b in zip(point, other, strict=True)] for other in points[place + 1 :]]
        volume += box - (hypervolume(limited, reference) if box and limited else 0.0)
    return volume


@dataclass
class HypervolumeWeight(Combiner):
    """Batches that push the Pareto front forward count more::

        p = mean of each component over the batch;   the first p is the reference point
        d = hypervolume(front and p) - hypervolume(front);   p joins the front if d > 0
        r <- (0.5 + 1.5 * tanh(d / scale)) * r           r: the weighted sum of the components

    Lu et al. 2025, section 4.1. The paper's points are validation scores; here they are those of the training batch,
    which are there at every step and noisier. Dominated points are forgotten. `scale` is the size of a step forward
    that counts in full.
    """

    name = "hypervolume-weight"
    paper = PAPER
    unverified = "points are means of training batches, not validation scores"

    scale: Positive = 1.0
    reference: list[float] = field(default_factory=list, init=False)
    front: list[list[float]] = field(default_factory=list, init=False)

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        weight, gain = 1.0, 0.0
        if inputs.scored.any() and inputs.component_names:
            point = [float(component(inputs, n, self.name)[inputs.scored].mean()) for n in inputs.component_names]
            if not self.reference:
                self.reference = point
            else:
                gain = hypervolume([*self.front, point], self.reference) - hypervolume(self.front, self.reference)
                if gain > 1e-12:
                    kept = [p for p in self.front if any(a > b for a, b in zip(p, point, strict=True))]
                    self.front = [*kept, point]
                weight = 0.5 + 1.5 * math.tanh(gain / self.scale)
        out = estimate(inputs.scores * weight)
        metrics: dict[str, Metric] = {"dynamic/weight": Last(weight), "dynamic/hypervolume_gain": Last(gain)}
        return replace(out, metrics=merge([out.metrics, metrics]))

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "front": self.front}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference, self.front = list(state["reference"]), [list(point) for point in state["front"]]


@dataclass
class GradientWeight(Combiner):
    """Objectives whose gradient helps the others count more::

        s_k = sum_j <g_k, g_j>;    w <- softmax(log w + rate * s / regularization);    r = sum_k w_k * r_k

    Lu et al. 2025, section 4.2. g_k is the policy gradient of objective k. Here <g_k, g_j> is approximated by the mean
    over the trained tokens of A_k * A_j, with A_k estimated from component k alone: exact if the gradients of log-probs
    of different tokens were orthogonal and of equal norm. `start` are the weights at first; equal if empty.
    """

    name = "gradient-weight"
    paper = PAPER
    unverified = "inner products of gradients are approximated by those of the advantages"
    estimates_often = True

    rate: NonNegative = 0.01
    regularization: Positive = 1.0
    start: Mapping[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        names = inputs.component_names
        if not self.weights:
            given = {name: self.start.get(name, 1.0) for name in names}
            self.weights = {name: value / sum(given.values()) for name, value in given.items()}
        mask, values = inputs.mask, {name: component(inputs, name, self.name) for name in names}
        parts = {name: estimate(values[name], penalties=False).advantages for name in names}
        if mask.any() and names:
            flat = torch.stack([part[mask].double() for part in parts.values()])
            influence = (flat @ flat.T / mask.sum()).sum(1)
            logits = torch.tensor([math.log(max(self.weights[name], 1e-12)) for name in names], dtype=torch.float64)
            moved = (logits + self.rate * influence / self.regularization).softmax(0).tolist()
            self.weights = dict(zip(names, moved, strict=True))
        scores = sum((self.weights[name] * values[name] for name in names), torch.zeros(len(inputs.scores)))
        out = estimate(scores)
        metrics: dict[str, Metric] = {f"dynamic/weight_{name}": Last(self.weights[name]) for name in names}
        return replace(out, metrics=merge([out.metrics, metrics]))

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = dict(state["weights"])
