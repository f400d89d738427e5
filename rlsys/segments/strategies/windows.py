"""Long responses a window at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rlsys.registry import Count
from rlsys.roles import Branch, Sampling
from rlsys.segments import Rounds, Strategy, prefix_of


@dataclass
class Windows(Strategy):
    """A step samples at most a window of each response; what is unfinished goes on in a later step::

        y_i ~ pi(. | x),  cut after `tokens`;     then  y_i' ~ pi(. | x, y_i)  as a prompt of its own, and so on

    Fan et al. 2025 (T-PPO, successive batching): 8 thousand tokens of 24 thousand. What was sampled before stands in
    the prompt and is not trained on again; a response that goes on is a group of its own, so the advantage has to do
    without a group (`gae`).
    """

    name = "windows"
    paper = "Fan et al. 2025, Truncated Proximal Policy Optimization, arXiv:2506.15050"
    defers = True

    tokens: Count = 8192

    def first(self, sampling: Sampling) -> Sampling:
        return replace(sampling, max_new_tokens=min(self.tokens, self.max_new_tokens))

    def branch(self, rounds: Rounds) -> list[Branch]:
        [group] = rounds[0]
        out = []
        for rollout in group.rollouts:
            prefix = np.concatenate([prefix_of(group.prompt), rollout.token_ids])
            left = self.max_new_tokens - len(prefix)
            if rollout.finish_reason == "length" and left > 0:
                ids = np.concatenate([group.prompt.token_ids, rollout.token_ids]).astype(np.int32)
                name = f"{group.prompt.id}/{rollout.sample}"
                prompt = replace(group.prompt, id=name, token_ids=ids, prefix_tokens=len(prefix))
                out.append(Branch(prompt, 1, min(self.tokens, left)))
        return out

    def expected_tokens(self, samples: int) -> float:
        return float(samples * min(self.tokens, self.max_new_tokens))
