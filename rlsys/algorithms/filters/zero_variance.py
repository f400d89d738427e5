"""Drop groups that teach nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

from rlsys.algorithms.filters import GroupFilter
from rlsys.registry import NonNegative
from rlsys.types import GroupInfo


@dataclass
class ZeroVariance(GroupFilter):
    """Dynamic sampling: drop groups whose scores are all equal, since their group-relative advantages are zero::

        keep  <=>  max(r) - min(r) > tolerance      over the scored rollouts of the group

    DAPO, arXiv:2503.14476, equation 11, which asks for an accuracy strictly between 0 and 1. A group without a scored
    rollout is dropped too.
    """

    name = "zero-variance"
    paper = "Yu et al. 2025, DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476"

    tolerance: NonNegative = 0.0

    def drop_reason(self, info: GroupInfo) -> str | None:
        scores = [score for score in info.scores if not isnan(score)]
        if not scores:
            return "no scored rollout"
        return "zero variance" if max(scores) - min(scores) <= self.tolerance else None
