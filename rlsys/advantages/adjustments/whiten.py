"""Whitening over the whole batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Last
from rlsys.registry import Positive


@dataclass
class Whiten(Adjustment):
    """Zero mean and unit deviation over the batch::

        A <- (A - mean(A)) / (std(A) + eps)      over all trained tokens, or over responses (each counts once)

    Of REINFORCE++, Hu 2025, section 3 (over tokens), and single-stream policy optimisation, arXiv:2509.13232 (over
    sequences). The deviation is that of the batch (n, not n - 1).
    """

    name = "whiten"
    paper = "Hu 2025, REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models, arXiv:2501.03262"

    over: Literal["tokens", "sequences"] = "tokens"
    eps: Positive = 1e-8

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        mask = inputs.mask & inputs.scored[:, None]
        values = advantages.advantages.double()
        weights = mask.double()
        if self.over == "sequences":
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        total = weights.sum().clamp(min=1e-12)
        mean = (values * weights).sum() / total
        std = ((values - mean).square() * weights).sum().div(total).sqrt()
        white = torch.where(std > 1e-7, (values - mean) / (std + self.eps), 0)
        metrics = {"whiten/mean": Last(float(mean)), "whiten/std": Last(float(std))}
        return replace(advantages, advantages=(white * mask).float(), metrics=metrics)
