"""A bandit over the categories of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlsys.curricula import TRIES, Choice, Curriculum, Rows, Seen
from rlsys.errors import DataError
from rlsys.registry import Positive, UnitInterval
from rlsys.types import Progress


@dataclass
class CategoryBandit(Curriculum):
    """Each prompt from a category with a chance that grows with what the policy has learned from it of late::

        p(c) = softmax(Q(c) / temperature)          then a row of c, each as likely as the others
        r(c) = mean |A| over the rollouts of category c in the step
        Q(c) <- rate * r(c) + (1 - rate) * Q(c)     for the categories in the step; Q = 0 at first

    Chen et al. 2025 (SEC): rate = 0.5. `key` names the metadata that hold the category (`metadata_keys` of the source;
    the built-in sums have `terms`). A group that is dropped after it was scored counts as |A| = 0. Of an endless source
    the categories are those among its first 1000 rows.
    """

    name = "category-bandit"
    paper = "Chen et al. 2025, Self-Evolving Curriculum for LLM Reasoning, arXiv:2505.14970"
    unverified = "the temperature, which the authors choose per task"

    key: str = "category"
    temperature: Positive = 1.0
    rate: UnitInterval = 0.5
    values: dict[str, float] = field(default_factory=dict, init=False)

    def bind(self, rows: Rows, seed: int, samples: int) -> None:
        super().bind(rows, seed, samples)
        self._members: dict[str, list[int]] = {}
        for row in self.known():
            self._members.setdefault(str(rows.attribute(int(row), self.key)), []).append(int(row))
        self._names = sorted(self._members)
        self.values = dict.fromkeys(self._names, 0.0) | self.values

    def chances(self) -> np.ndarray:
        """p(c), float64, in order of name."""
        q = np.array([self.values[name] for name in self._names]) / self.temperature
        weights = np.exp(q - q.max())
        return np.asarray(weights / weights.sum())

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        chances = self.chances()
        out = []
        for index in indices:
            rng = self.rng(index)
            name = self._names[int(rng.choice(len(self._names), p=chances))]
            out.append(Choice(self._row(name, index, rng), f"d{index}"))
        return out

    def _row(self, name: str, index: int, rng: np.random.Generator) -> int:
        if self.rows.size is not None:
            members = self._members[name]
            return members[int(rng.integers(len(members)))]
        for row in self.some(index):
            if str(self.rows.attribute(row, self.key)) == name:
                return row
        raise DataError(f"no prompt with {self.key} {name} among {TRIES} of an endless source")

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for one in seen:
            category = str(self.rows.attribute(one.choice.row, self.key))
            found.setdefault(category, []).append(one.advantage or 0.0)
        for category, sizes in found.items():
            self.values[category] = self.rate * sum(sizes) / len(sizes) + (1 - self.rate) * self.values[category]
        return {f"curriculum/chance_{name}": float(p) for name, p in zip(self._names, self.chances(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values |= state["values"]
