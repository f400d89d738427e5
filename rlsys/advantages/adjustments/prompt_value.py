"""A critic of prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.advantages.groups import group_statistics
from rlsys.metrics import Mean


@dataclass
class PromptValueTarget(Adjustment):
    """The critic learns what a prompt's rollouts score on average, and nothing else::

        target of V at the end of the prompt = mean_j r_ij        no error anywhere else

    Gao et al. 2025 (PCL): minimise sum_i (V(x_i) - mean_j r_ij)^2. The advantages stay as they are.
    """

    name = "prompt-value-target"
    paper = "Gao et al. 2025, Prompt Curriculum Learning for Efficient LLM Post-Training, arXiv:2510.01135"
    needs_values = True

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        assert inputs.values is not None
        _, mean, _ = group_statistics(inputs.scores, inputs.group, inputs.scored)
        mean = mean.float()
        first = torch.zeros_like(inputs.mask)
        first[:, 0] = inputs.mask[:, 0]
        error = (inputs.values[:, 0] - mean).abs()[first[:, 0]]
        return replace(
            advantages,
            returns=torch.where(first, mean[:, None], inputs.values),
            metrics={"prompt_value/error": Mean(float(error.sum()), float(len(error)))},
        )
