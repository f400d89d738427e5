"""Less of a pull to the reference where a prompt is hard."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.metrics import Mean
from rlsys.registry import NonNegative, UnitInterval


@dataclass
class DifficultyKL(Adjustment):
    """Hard prompts are held to the reference less, by the accuracy of their group; the advantages stay::

        accuracy = share of the scored responses of the prompt with a score above `right`
        kl_scale = scale where accuracy <= hard, else 1        the regulariser kl multiplies its coefficient by it

    Zhang et al. 2025 (CLPO), hard = 0.3, scale = 0.5. There it is for the rewritten forms of hard prompts; prompts are
    not rewritten here, so it is for the hard prompts themselves.
    """

    name = "difficulty-kl"
    paper = "Zhang et al. 2025, CLPO: Curriculum Learning meets Policy Optimization for LLM Reasoning, arXiv:2509.25004"
    provides = ("kl_scale",)

    hard: UnitInterval = 0.3
    scale: NonNegative = 0.5
    right: float = 0.5

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        correct = (inputs.scores > self.right).float()
        count, accuracy, _ = group_statistics(correct, inputs.group, inputs.scored)
        hard = (count > 0) & (accuracy <= self.hard)
        scale = to_tokens(torch.where(hard, self.scale, 1.0), inputs.mask)
        trained = inputs.mask.any(1)
        metrics = {
            "clpo/hard": Mean(float((hard & trained).sum()), float(trained.sum())),
            "clpo/accuracy": Mean(float(accuracy[inputs.scored].sum()), float(inputs.scored.sum())),
        }
        return replace(advantages, extras={**advantages.extras, "kl_scale": scale}, metrics=metrics)
