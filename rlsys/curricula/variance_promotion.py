"""Half of the prompts by how much their rollouts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlsys.curricula import Choice, Curriculum, Seen
from rlsys.registry import Count, NonNegative, UnitInterval
from rlsys.types import Progress


@dataclass
class VariancePromotion(Curriculum):
    """Some draws go to prompts seen before, by how promising they are; the others come in order::

        VPS = outcome * p * (1 - p) + diversity * d        as of the prompt's last visit
        with probability mixture:  row ~ VPS, with replacement        else: the next row in order

    Leng et al. 2025 (MMR1, Variance-Aware Sampling): mixture = 0.5. p is the share of scores above 0.5; d the share of
    different three-token sequences among all of the group's rollouts (distinct-3). The scores take effect every
    `refresh` steps.
    """

    name = "variance-promotion"
    paper = (
        "Leng et al. 2025, MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources, "
        "arXiv:2509.21268"
    )
    unverified = "the weights of outcome and diversity, and how often the scores are refreshed"

    mixture: UnitInterval = 0.5
    outcome: NonNegative = 1.0
    diversity: NonNegative = 1.0
    refresh: Count = 10
    scores: dict[str, float] = field(default_factory=dict, init=False)  # by row, as of now
    used: dict[str, float] = field(default_factory=dict, init=False)  # as of the last refresh
    steps: int = field(default=0, init=False)

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        rows = list(self.used)
        weights = np.array([self.used[row] for row in rows])
        total = float(weights.sum())
        out = []
        for index in indices:
            rng = self.rng(index)
            if total > 0 and rng.random() < self.mixture:
                out.append(Choice(int(rows[int(rng.choice(len(rows), p=weights / total))]), f"d{index}"))
            else:
                out.append(self.in_order(index))
        return out

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        for one in seen:
            scores = [score for score in one.info.scores if score == score]
            if scores:
                p = sum(score > 0.5 for score in scores) / len(scores)
                score = self.outcome * p * (1 - p) + self.diversity * one.info.distinct_3
                self.scores[str(one.choice.row)] = score
        self.steps += 1
        if self.steps % self.refresh == 0:
            self.used = dict(self.scores)
        promoted = sum(one.choice.epoch.startswith("d") for one in seen)
        return {"curriculum/promoted": promoted / len(seen)} if seen else {}

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "used": dict(self.used), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores, self.used, self.steps = dict(state["scores"]), dict(state["used"]), int(state["steps"])
