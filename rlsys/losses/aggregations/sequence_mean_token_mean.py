"""Mean over the tokens of a response, then over the responses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlsys.losses import Aggregation


@dataclass
class SequenceMeanTokenMean(Aggregation):
    """Every response counts the same, so the tokens of long ones count less::

        w = mask / (tokens of the response) / (responses)

    GRPO, arXiv:2402.03300, equation 3.
    """

    name = "sequence-mean-token-mean"
    paper = "Shao et al. 2024, DeepSeekMath, arXiv:2402.03300"

    def __call__(self, mask: Tensor) -> Tensor:
        weights = mask.float()
        tokens = weights.sum(1, keepdim=True)
        return weights / tokens.clamp(min=1) / (tokens > 0).sum().clamp(min=1)
