"""Sum over the tokens of a response, mean over the responses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlsys.losses import Aggregation


@dataclass
class SequenceMeanTokenSum(Aggregation):
    """The policy gradient of whole sequences, without a bias by length::

        w = mask / (responses)

    As in RLOO, arXiv:2402.14740, where a response is one action whose log-probability is the sum over its tokens.
    """

    name = "sequence-mean-token-sum"
    paper = "Ahmadian et al. 2024, Back to Basics: Revisiting REINFORCE Style Optimization, arXiv:2402.14740"

    def __call__(self, mask: Tensor) -> Tensor:
        weights = mask.float()
        return weights / mask.any(1).sum().clamp(min=1)
