"""Cuts where the policy begins to speak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.segments import Partition
from rlsys.types import Rollout


@dataclass
class Turns(Partition):
    """At the first token of every turn of the policy, after what a tool or an environment has put in::

        cuts: t where action_mask_t and not action_mask_{t-1}

    One segment is then what the policy said, and what it was answered.
    """

    name = "turns"
    paper = "Guo et al. 2025, Segment Policy Optimization, arXiv:2505.23564"

    def boundaries(self, rollout: Rollout, pieces: Sequence[str]) -> Sequence[int]:
        mask = rollout.action_mask
        found: list[int] = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]])).tolist()
        return found
