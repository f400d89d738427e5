"""Factors on the advantages of whole responses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.advantages.answers import NUMBER, final_answers
from rlsys.errors import LearnerError
from rlsys.metrics import Mean
from rlsys.registry import NonNegative


@dataclass
class SemanticEntropyScale(Adjustment):
    """Smaller updates for prompts whose answers scatter::

        p(C) = sum over the responses with answer C of softmax(mean_t log pi_behav)      softmax over the group
        SE   = -sum p(C) * log p(C)
        A_i <- A_i * (1 - alpha * SE / log(G))      G responses

    Chen et al. 2025 (SEED-GRPO). Responses are alike when their final answers are (the last match of `answer`).
    """

    name = "semantic-entropy-scale"
    paper = "Chen et al. 2025, SEED-GRPO: Semantic Entropy Enhanced GRPO, arXiv:2505.12346"
    unverified = "alpha, and the linear form of the factor, are those of a third party's port"

    alpha: NonNegative = 0.0417
    answer: str = NUMBER

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        answers = final_answers(inputs.texts, self.answer) or [""] * len(inputs.scores)
        tokens = inputs.mask.sum(1).clamp(min=1)
        likelihood = (inputs.behavior_logprobs * inputs.mask).sum(1).double() / tokens
        factor = torch.ones(len(inputs.scores), dtype=torch.float64)
        entropies = []
        for g in inputs.group.unique().tolist():
            rows = torch.nonzero((inputs.group == g) & inputs.scored)[:, 0]
            if len(rows) < 2:
                continue
            shares = likelihood[rows].softmax(0)
            clusters: dict[str, float] = {}
            for row, share in zip(rows.tolist(), shares.tolist(), strict=True):
                clusters[answers[row]] = clusters.get(answers[row], 0.0) + share
            entropy = -sum(p * math.log(p) for p in clusters.values() if p > 0)
            entropies.append(entropy)
            factor[inputs.group == g] = max(0.0, 1 - self.alpha * entropy / math.log(len(rows)))
        scaled = (advantages.advantages * factor[:, None]).float()
        return replace(advantages, advantages=scaled, metrics={"seed/semantic_entropy": Mean.of(entropies)})


@dataclass
class ComponentScale(Adjustment):
    """Weigh every response by what one of its reward functions says::

        A_i <- component_i * A_i

    The dynamic reward scaling of DR-IRL, Cheng et al. 2025, whose weight alpha is a product of how far a response is
    from demonstrations and of its reward gap; a reward function of weight 0 that computes it is named in `component`.
    """

    name = "component-scale"
    paper = "Cheng et al. 2025, Inverse Reinforcement Learning with Dynamic Reward Scaling, arXiv:2503.18991"

    component: str = "difficulty"

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        if inputs.components is None or self.component not in inputs.component_names:
            have = ", ".join(inputs.component_names) or "none"
            raise LearnerError(
                f"{self.name}: no reward component {self.component!r} came with the batch; there are {have}"
            )
        values = inputs.components[:, inputs.component_names.index(self.component)].nan_to_num(1.0)
        metrics = {f"component/{self.component}": Mean(float(values[inputs.scored].sum()), float(inputs.scored.sum()))}
        return replace(advantages, advantages=advantages.advantages * values[:, None], metrics=metrics)
