"""The entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.losses import LossInputs, Regularizer, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.registry import NonNegative


@dataclass
class Entropy(Regularizer):
    """Reward the entropy of the policy, which keeps it from collapsing too early::

        L = -coefficient * H(pi(. | s))

    H is in nats, over the whole vocabulary at every trained token. Williams and Peng 1991; in this form Mnih et al.
    2016, section 4 (coefficient 0.01). A coefficient of 0 only measures.
    """

    name = "entropy"
    paper = "Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning, arXiv:1602.01783"
    needs_entropy = True

    coefficient: NonNegative = 0.001

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        assert inputs.entropy is not None
        metrics = token_means(inputs.mask, {"policy/entropy": inputs.entropy})
        return TokenLoss((-self.coefficient * inputs.entropy).masked_fill(~inputs.mask, 0), metrics)
