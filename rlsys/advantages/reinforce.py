"""REINFORCE with a running baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import to_tokens
from rlsys.metrics import Last
from rlsys.registry import UnitInterval


@dataclass
class Reinforce(Estimator):
    """Score minus a baseline b that is carried from step to step; groups do not matter::

        A_i = r_i - b
        b <- mean of all scores of all steps so far                  (momentum = null)
        b <- momentum * b + (1 - momentum) * mean(r of this step)    (otherwise)

    b is updated after it was used, so it never depends on the scores that it is taken from. The first step has no
    earlier one and uses its own mean, which on average only scales its gradient by (1 - 1/N). For language models with
    the mean of all scores so far in Ahmadian et al. 2024, arXiv:2402.14740.
    """

    name = "reinforce"
    paper = "Williams 1992, Simple statistical gradient-following algorithms, doi:10.1007/BF00992696"

    momentum: UnitInterval | None = None
    baseline: float | None = field(default=None, init=False)
    seen: int = field(default=0, init=False)

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        scores = inputs.scores[inputs.scored].double()
        if not len(scores):
            return Advantages(to_tokens(inputs.scores * 0, inputs.mask))
        mean = float(scores.mean())
        baseline = mean if self.baseline is None else self.baseline
        self.seen += len(scores)
        step = len(scores) / self.seen if self.momentum is None else 1 - self.momentum
        self.baseline = baseline + step * (mean - baseline)
        advantages = to_tokens(inputs.scores.double() - baseline, inputs.mask)
        return Advantages(advantages, metrics={"advantages/baseline": Last(baseline)})

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.baseline, self.seen = state["baseline"], state["seen"]
