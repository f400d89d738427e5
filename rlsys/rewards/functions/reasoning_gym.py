"""Scores of the reasoning-gym library: every data set brings its own scorer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlsys.rewards import RewardFunction, Sample

_Scorer = Callable[[str | None, Mapping[str, Any]], float]


@dataclass
class ReasoningGym(RewardFunction):
    """The data set's own `score_answer`, between 0 and 1 (some give partial credit).

    Prompts come from the source `reasoning_gym`, whose metadata carries the data set, its parameters and the entry.
    """

    name: ClassVar[str] = "reasoning_gym"

    # The answer is what the last <tag>...</tag> holds, nothing without one; null: the whole response, stripped.
    tag: str | None = None
    # false: a score below 1 is 0. Some scorers pay part of it for an answer with the right one inside, as "-21" for 21.
    partial_credit: bool = True

    def prepare(self) -> None:
        import reasoning_gym  # noqa: F401  (seconds to import: now rather than at the first sample)

        self._scorers: dict[str, _Scorer] = {}

    def score(self, sample: Sample) -> float:
        for key in ("dataset", "parameters", "entry"):
            if key not in sample.metadata:
                raise ValueError(f"the prompt is not from a reasoning_gym source: its metadata has no {key!r}")
        scorer = self._scorer(sample.metadata["dataset"], sample.metadata["parameters"])
        score = scorer(self._answer(sample.response), sample.metadata["entry"])
        return score if self.partial_credit or score == 1 else 0.0

    def _answer(self, response: str) -> str | None:
        if self.tag is None:
            return response.strip()
        found = re.findall(rf"<{re.escape(self.tag)}>(.*?)</{re.escape(self.tag)}>", response, re.DOTALL)
        return found[-1].strip() if found else None

    def _scorer(self, dataset: str, parameters: Mapping[str, Any]) -> _Scorer:
        from reasoning_gym import create_dataset

        key = json.dumps([dataset, parameters], sort_keys=True, default=str)
        if key not in self._scorers:
            # Some scorers read their data set's configuration, so it is made with the same parameters.
            self._scorers[key] = create_dataset(dataset, **parameters).score_answer
        return self._scorers[key]
