"""Cuts where the policy was in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.registry import Count, UnitInterval
from rlsys.segments import Partition
from rlsys.types import Rollout


@dataclass
class LowProbability(Partition):
    """Before every k-th token that was not to be expected::

        U = {t: pi(y_t) < threshold}        cuts: U_0, U_k, U_2k, ...       k = every

    Guo et al. 2025 (SPO-chain): threshold = 0.9, every = 5 for GSM8K. The probabilities are those at which the tokens
    were sampled; the authors compute them anew.
    """

    name = "low-probability"
    paper = "Guo et al. 2025, Segment Policy Optimization, arXiv:2505.23564"

    threshold: UnitInterval = 0.9
    every: Count = 5

    def boundaries(self, rollout: Rollout, pieces: Sequence[str]) -> Sequence[int]:
        doubtful = np.flatnonzero(np.exp(rollout.behavior_logprobs) < self.threshold)
        found: list[int] = doubtful[:: self.every].tolist()
        return found
