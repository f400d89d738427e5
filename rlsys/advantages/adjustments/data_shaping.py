"""Data shaping: which responses of a group count, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.advantages.groups import group_statistics, group_sum, to_tokens
from rlsys.metrics import Mean
from rlsys.registry import Positive

PAPER = "Yao et al. 2025, Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm, arXiv:2509.24203"


@dataclass
class DropNegatives(Adjustment):
    """Where most responses of a group are below its mean, drop some of them at random until as many are above::

        positive: r_i >= mean(r)      if #negative > #positive: keep #positive of the negative ones
        A_i = r_i - mean(r of what is kept)      0 for what is dropped

    Yao et al. 2025 (RED-Drop). It computes the advantages anew, so it belongs after `grpo` with std = false. The draw
    is seeded by the number of the batch, so a resumed run repeats it.
    """

    name = "drop-negatives"
    paper = PAPER

    batches: int = field(default=0, init=False)

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        self.batches += 1
        scored = inputs.scored
        _, mean, _ = group_statistics(inputs.scores, inputs.group, scored)
        positive = scored & (inputs.scores >= mean)
        negative = scored & ~positive
        room = group_sum(torch.ones(len(scored)), inputs.group, positive)
        # A random rank among the negative rows of the same group: how many of them drew a smaller number.
        drawn = torch.rand(len(scored), generator=torch.Generator().manual_seed(self.batches))
        rivals = (inputs.group[:, None] == inputs.group[None, :]) & negative[None, :]
        rank = (rivals & (drawn[None, :] < drawn[:, None])).sum(1)
        kept = positive | (negative & (rank < room))
        _, mean, _ = group_statistics(inputs.scores, inputs.group, kept)
        shaped = torch.where(kept, inputs.scores - mean, 0)
        mask = inputs.mask & kept[:, None]
        metrics = {"red/dropped": Mean(float((scored & ~kept).sum()), float(scored.sum()))}
        return replace(advantages, advantages=to_tokens(shaped, mask), mask=mask, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches = state["batches"]


@dataclass
class ExponentialWeight(Adjustment):
    """Responses count by the exponential of their advantage, so that good ones lead::

        A <- exp(A / temperature) * A

    Yao et al. 2025 (RED-Weight, temperature = 1). The exponent is clamped to 20.
    """

    name = "exponential-weight"
    paper = PAPER

    temperature: Positive = 1.0

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        weight = (advantages.advantages / self.temperature).clamp(max=20).exp()
        trained = inputs.mask
        metrics = {"red/weight": Mean(float(weight[trained].sum()), float(trained.sum()))}
        return replace(advantages, advantages=weight * advantages.advantages, metrics=metrics)
