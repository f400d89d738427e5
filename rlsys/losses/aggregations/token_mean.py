"""Mean over all tokens of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlsys.losses import Aggregation


@dataclass
class TokenMean(Aggregation):
    """Every token counts the same, so long responses count more::

        w = mask / (tokens of the batch)

    DAPO, arXiv:2503.14476, equation 12.
    """

    name = "token-mean"
    paper = "Yu et al. 2025, DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476"

    def __call__(self, mask: Tensor) -> Tensor:
        weights = mask.float()
        return weights / weights.sum().clamp(min=1)
