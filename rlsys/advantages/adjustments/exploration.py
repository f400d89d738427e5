"""What becomes of groups that were sampled at another temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Mean, Sum
from rlsys.registry import Count


@dataclass
class ExploredSuccesses(Adjustment):
    """REINFORCE on the successes among rollouts of another temperature, in place of as many ordinary rollouts::

        explored rows:  A = 1 on every token   where A > threshold,    else not trained
        N = rows, or rows / 2 when the temperature is lowered          the first N of them are trained
        ordinary rows:  the first N are not trained

    Wang et al. 2025 (AEPO): rows = 60, threshold = 0.05. The gradient of log pi at samples of a higher temperature
    raises the entropy, at samples of a lower one it lowers it. The log-probs of explored rows are those of their own
    temperature: use correction `recompute`.
    """

    name = "explored-successes"
    paper = (
        "Wang et al. 2025, Arbitrary Entropy Policy Optimization: Entropy Is Controllable in Reinforcement Finetuning, "
        "arXiv:2510.08141"
    )
    takes_explored = True

    rows: Count = 60
    threshold: float = 0.05

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        heat = torch.zeros(len(inputs.mask), dtype=torch.int8) if inputs.explored is None else inputs.explored
        explored = heat != 0
        most = self.rows if int(heat.sum()) > 0 else max(1, self.rows // 2)
        counts = inputs.mask.sum(1)
        mean = advantages.advantages.masked_fill(~inputs.mask, 0).sum(1) / counts.clamp(min=1)
        successes = _first(explored & (counts > 0) & (mean > self.threshold), most)
        replaced = _first(~explored & (counts > 0), int(successes.sum()))
        trained = (successes | (~explored & ~replaced))[:, None] & inputs.mask
        values = torch.where(successes[:, None], 1.0, advantages.advantages) * trained
        return replace(
            advantages,
            advantages=values,
            mask=trained,
            metrics={
                "explored/rows": Sum(float(explored.sum())),
                "explored/trained": Sum(float(successes.sum())),
                "explored/success": Mean(
                    float((explored & (mean > self.threshold)).sum()), float((explored & (counts > 0)).sum())
                ),
            },
        )


def _first(rows: torch.Tensor, most: int) -> torch.Tensor:
    """The first `most` True of bool [B]."""
    return rows & (rows.cumsum(0) <= most)
