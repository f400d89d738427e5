"""Optimal values of prompts, from samples of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import to_tokens
from rlsys.metrics import Last, Mean, Metric
from rlsys.registry import Positive


def prompt_key(prompt_id: str) -> str:
    """The prompt behind a draw: its id without the epoch, such as "sums/17" for "sums/17@2"."""
    return prompt_id.rpartition("@")[0] or prompt_id


@dataclass
class OptimalValue(Estimator):
    """The score over what the best policy near the reference would get::

        V*(x) = beta * log(mean_i exp(r_i / beta))      over the responses of the first visit of the prompt, kept
        A_i   = r_i - V*(x)

    Brantley et al. 2025 (A*-PO), stage 1, beta = 0.5. The paper samples 8 responses of every prompt from the reference
    before training, and drops prompts that none of them solves. Here both stages are one run: the first visit of a
    prompt estimates V*, so give it a group (`rollout.samples_per_prompt: 8`); with frequent visits the later ones use
    what is kept. Prompts whose first group has no score above `hopeless` are not trained on.
    """

    name = "optimal-value"
    paper = (
        "Brantley et al. 2025, Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv:2505.20686"
    )
    unverified = "stage 1 samples the policy at the first visit of a prompt, not the reference before training"

    beta: Positive = 0.5
    hopeless: float = 0.0
    values: dict[str, float | None] = field(default_factory=dict, init=False)

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        baseline = torch.zeros(len(inputs.scores), dtype=torch.float64)
        kept = torch.ones(len(inputs.scores), dtype=torch.bool)
        for number in inputs.group.unique().tolist():
            rows = torch.nonzero(inputs.group == number)[:, 0]
            key = prompt_key(inputs.prompt_ids[int(rows[0])])
            scores = inputs.scores[rows][inputs.scored[rows]].double()
            if key not in self.values:
                if not len(scores):
                    continue  # nothing was learnt of it; its rows are masked
                value = self.beta * (torch.logsumexp(scores / self.beta, 0) - torch.tensor(float(len(scores))).log())
                self.values[key] = float(value) if float(scores.max()) > self.hopeless else None
            known = self.values[key]
            baseline[rows] = 0.0 if known is None else known
            kept[rows] = known is not None
        mask = inputs.mask & kept[:, None]
        known_values = [value for value in self.values.values() if value is not None]
        metrics: dict[str, Metric] = {
            "a-star-po/value": Mean.of(known_values),
            "a-star-po/prompts": Last(float(len(self.values))),
            "a-star-po/hopeless": Last(float(len(self.values) - len(known_values))),
        }
        return Advantages(to_tokens(inputs.scores.double() - baseline, mask), metrics=metrics, mask=mask)

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state["values"])
