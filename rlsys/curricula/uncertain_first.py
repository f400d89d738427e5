"""Prompts whose outcome is the least certain are the likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlsys.curricula import Choice, Curriculum, Seen, runs
from rlsys.registry import Count, Positive
from rlsys.types import Progress


@dataclass
class UncertainFirst(Curriculum):
    """Of `pool` candidates for every draw, in order, those drawn by the spread of their outcome::

        w = sqrt(v * (1 - v)) + eps        v: value of the prompt, 1/2 when it was never seen
        drawn without replacement, with chances proportional to w

    Xu and Ding 2025 (SPO, prioritised sampling): eps = 0.05 and 1024 of 14 thousand. v is what the estimator tracks
    (`tracked-baseline`); with one that tracks nothing, it is the mean score at the last visit.
    """

    name = "uncertain-first"
    paper = "Xu and Ding 2025, Single-stream Policy Optimization, arXiv:2509.13232"

    pool: Count = 14
    eps: Positive = 0.05
    values: dict[str, float] = field(default_factory=dict, init=False)

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        out: list[Choice] = []
        for chunk in runs(indices):
            places = range(chunk[0] * self.pool, (chunk[-1] + 1) * self.pool)
            candidates = list(dict.fromkeys(self.rows.at(place)[0] for place in places))
            while len(candidates) < len(chunk):  # fewer rows than draws: each once more
                candidates += candidates
            v = np.array([min(1.0, max(0.0, self.values.get(str(row), 0.5))) for row in candidates])
            # The largest of log(w) + Gumbel noise: a draw without replacement (Efraimidis and Spirakis 2006).
            keys = np.log(np.sqrt(v * (1 - v)) + self.eps) + self.rng(chunk[0]).gumbel(size=len(v))
            chosen = np.argsort(-keys, kind="stable")[: len(chunk)]
            out += [Choice(candidates[int(i)], f"d{index}") for i, index in zip(chosen, chunk, strict=True)]
        return out

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        for one in seen:
            value = one.mean if one.value is None else one.value
            if value is not None:
                self.values[str(one.choice.row)] = value
        drawn = [self.values[row] for one in seen if (row := str(one.choice.row)) in self.values]
        if not drawn:
            return {}
        return {
            "curriculum/known": float(len(self.values)),
            "curriculum/uncertainty": float(np.mean([max(0.0, v * (1 - v)) ** 0.5 for v in drawn])),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state["values"])
