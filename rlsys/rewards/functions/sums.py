"""The built-in sums task: right or wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlsys.rewards import RewardFunction, Sample


@dataclass(frozen=True)
class Sums(RewardFunction):
    """1 when the response ends in the right total, else 0."""

    name: ClassVar[str] = "sums"

    def score(self, sample: Sample) -> float:
        if sample.answer is None:
            raise ValueError("the prompt has no reference answer")
        return float(total(sample.response) == int(sample.answer))


def total(response: str) -> int | None:
    """The number after the last comma (the whole text when there is none); None when it is no number."""
    tail = response.rpartition(",")[2].strip()
    return int(tail) if tail.isdecimal() and tail.isascii() else None
