"""The built-in sums task: right or wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlsys.prompts.sums import last_number
from rlsys.rewards import RewardFunction, Sample


@dataclass(frozen=True)
class Sums(RewardFunction):
    """1 when the response ends in the right total, else 0."""

    name: ClassVar[str] = "sums"

    def score(self, sample: Sample) -> float:
        if sample.answer is None:
            raise ValueError("the prompt has no reference answer")
        return float(last_number(sample.response) == int(sample.answer))
