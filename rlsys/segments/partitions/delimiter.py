"""Cuts after what ends a step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlsys.registry import Count
from rlsys.segments import Partition
from rlsys.types import Rollout


@dataclass
class Delimiter(Partition):
    r"""At the beginning, and after every k-th match of a regular expression::

        cuts: 0, and the first token that begins at or after the end of matches k, 2k, ...      k = every

    Kazemnejad et al. 2024 (VinePPO) cut at line breaks: pattern = "\n".
    """

    name = "delimiter"
    paper = "Kazemnejad et al. 2024, VinePPO: Refining Credit Assignment in RL Training of LLMs, arXiv:2410.01679"
    needs_text = True

    pattern: str = "\n"
    every: Count = 1

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None

    def boundaries(self, rollout: Rollout, pieces: Sequence[str]) -> Sequence[int]:
        starts = [0, *accumulate(map(len, pieces))]
        ends = [match.end() for match in re.finditer(self.pattern, "".join(pieces)) if match.end() > match.start()]
        wanted = [0, *ends[self.every - 1 :: self.every]]
        tokens = {next((t for t, start in enumerate(starts) if start >= end), len(pieces)) for end in wanted}
        return sorted(t for t in tokens if t < len(pieces))
