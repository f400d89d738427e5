"""Local and global advantages, blended by how much a group agrees."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.answers import NUMBER, final_answers
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.metrics import Mean
from rlsys.registry import Positive


@dataclass
class ConsistencyBlend(Estimator):
    """Where the responses of a prompt agree there is nothing to compare inside the group: compare prompts instead::

        A_local  = (r_i - mean) / (std + eps) of the group
        A_global = (R_q - mean) / (std + eps) over the prompts of the batch,     R_q = mean score of the group
        H = -sum p * log p      over the distinct final answers of the group
        w = sigmoid(gamma * (H - rho))
        A_i = w * A_local + (1 - w) * A_global

    Han et al. 2025 (COPO), gamma = 20, rho = 1.5. The paper weighs the two losses, which is the same as long as the
    clipped ratio is linear in the advantage (both of one sign, or inside the bounds). Final answers are the last match
    of `answer`.
    """

    name = "consistency-blend"
    paper = "Han et al. 2025, COPO: Consistency-Aware Policy Optimization, arXiv:2508.04138"
    unverified = "the rule is known from a review of the paper; advantages are blended in the place of losses"

    gamma: Positive = 20.0
    rho: float = 1.5
    answer: str = NUMBER
    eps: Positive = 1e-6

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        count, mean, std = group_statistics(inputs.scores, inputs.group, inputs.scored)
        local = torch.where(std > 0, (inputs.scores - mean) / (std + self.eps), 0)
        answers = final_answers(inputs.texts, self.answer) or [""] * len(inputs.scores)
        entropy = torch.zeros(len(mean), dtype=torch.float64)
        firsts = []
        for g in inputs.group.unique().tolist():
            rows = torch.nonzero((inputs.group == g) & inputs.scored)[:, 0].tolist()
            if not rows:
                continue
            firsts.append(rows[0])
            shares = [n / len(rows) for n in Counter(answers[row] for row in rows).values()]
            entropy[inputs.group == g] = -sum(p * math.log(p) for p in shares)
        means = mean[firsts]
        deviation = means.std() if len(means) > 1 else torch.zeros(())
        spread = mean - means.mean() if firsts else mean * 0
        across = torch.where(deviation > 0, spread / (deviation + self.eps), 0)
        weight = torch.sigmoid(self.gamma * (entropy - self.rho))
        blended = torch.where(count > 0, weight * local + (1 - weight) * across, 0)
        metrics = {
            "copo/consistency_entropy": Mean(float(entropy[firsts].sum()), float(len(firsts))),
            "copo/local_weight": Mean(float(weight[firsts].sum()), float(len(firsts))),
        }
        return Advantages(to_tokens(blended, inputs.mask), metrics=metrics)
