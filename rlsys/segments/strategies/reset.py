"""Responses that begin like a demonstration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlsys.registry import UnitInterval
from rlsys.segments import Strategy, with_prefix
from rlsys.types import Prompt


@dataclass
class Reset(Strategy):
    """Some prompts start from a random state of their demonstration d::

        with probability p:   y ~ pi(. | x, d_{<c}),   c uniform in 0 .. |d| - 1        else   y ~ pi(. | x)

    Chang et al. 2024 (DR-PO): p = 1. The reward sees the whole response; only what the policy sampled is trained on.
    All samples of a prompt start from the same state.
    """

    name = "reset"
    paper = "Chang et al. 2024, Dataset Reset Policy Optimization for RLHF, arXiv:2404.08495"
    needs_demonstration = True

    probability: UnitInterval = 1.0

    def start(self, prompt: Prompt) -> Prompt:
        rng = np.random.default_rng(prompt.seed)
        if prompt.demonstration is None or rng.random() >= self.probability:
            return prompt
        # The last token ends the response: from the state before it there would be nothing left to say.
        length = min(len(prompt.demonstration.token_ids), self.max_new_tokens) - 1
        cut = int(rng.integers(max(1, length)))
        return with_prefix(prompt, prompt.demonstration.token_ids[:cut])
