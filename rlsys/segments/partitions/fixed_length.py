"""Cuts at equal distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.registry import Count
from rlsys.segments import Partition
from rlsys.types import Rollout


@dataclass
class FixedLength(Partition):
    """Segments of so many tokens, the last one shorter::

        cuts: 0, tokens, 2 * tokens, ...

    The distances of SPO-tree's first levels, for a chain.
    """

    name = "fixed-length"
    paper = "Guo et al. 2025, Segment Policy Optimization, arXiv:2505.23564"

    tokens: Count = 100

    def boundaries(self, rollout: Rollout, pieces: Sequence[str]) -> Sequence[int]:
        return range(0, len(rollout.token_ids), self.tokens)
