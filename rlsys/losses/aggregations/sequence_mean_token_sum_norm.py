"""Sum over the tokens of a response over a fixed length, mean over the responses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlsys.losses import Aggregation
from rlsys.registry import Count


@dataclass
class SequenceMeanTokenSumNorm(Aggregation):
    """A sum over the tokens with a constant scale, free of the bias by length of a mean over them::

        w = mask / length / (responses)

    `length` is a constant; the paper takes the longest response allowed (`rollout.max_new_tokens`).
    Dr. GRPO, arXiv:2503.20783, section 3.2.
    """

    name = "sequence-mean-token-sum-norm"
    paper = "Liu et al. 2025, Understanding R1-Zero-Like Training: A Critical Perspective, arXiv:2503.20783"

    length: Count = 1024

    def __call__(self, mask: Tensor) -> Tensor:
        weights = mask.float()
        return weights / self.length / mask.any(1).sum().clamp(min=1)
