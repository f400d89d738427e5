"""An entropy bonus that is held near its own history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsys.losses import LossInputs, Regularizer, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.registry import NonNegative


@dataclass
class SmoothedEntropy(Regularizer):
    """Reward entropy, but not where it has left the range of earlier updates::

        L = -coefficient * (H - smooth * P)
        P = 0 where below * H_hist < H < above * H_hist, else penalty        H_hist: mean entropy of the updates before

    Xu et al. 2025 (EPO): coefficient = 0.001, smooth = 1, penalty = 0.1, range (0.8, 1.2). P is an indicator and has no
    gradient, in the paper as in its code: it moves the value of the loss, not the update. The history is one number;
    the paper keeps one for each turn of an environment.
    """

    name = "smoothed-entropy"
    paper = "Xu et al. 2025, EPO: Entropy-regularized Policy Optimization for LLM Agents, arXiv:2509.22576"
    needs_entropy = True
    needs_current_entropy = True

    coefficient: NonNegative = 0.001
    smooth: NonNegative = 1.0
    penalty: NonNegative = 0.1
    below: NonNegative = 0.8
    above: NonNegative = 1.2
    total: float = field(default=0.0, init=False)
    tokens: float = field(default=0.0, init=False)

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        assert inputs.entropy is not None
        known = self.tokens > 0
        history = self.total / self.tokens if known else -1.0
        self.total += float(inputs.entropy.masked_fill(~inputs.mask, 0).sum(dtype=torch.float64))
        self.tokens += float(inputs.mask.sum())
        return {"entropy_history": torch.full(inputs.mask.shape, history)}

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        assert inputs.entropy is not None
        history, entropy = inputs.extras["entropy_history"], inputs.entropy
        outside = (history >= 0) & ((entropy <= self.below * history) | (entropy >= self.above * history))
        bonus = entropy - self.smooth * self.penalty * outside
        measured = {"policy/entropy": entropy, "epo/outside": outside, "epo/history": history.clamp(min=0)}
        return TokenLoss((-self.coefficient * bonus).masked_fill(~inputs.mask, 0), token_means(inputs.mask, measured))

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.tokens = state["total"], state["tokens"]
