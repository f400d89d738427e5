"""Losses that learn from demonstrations: alone, or mixed with the policy's own rollouts.

`LossInputs.expert` says which rows are demonstrations. They have no behaviour log-probs and no importance ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlsys.errors import LearnerError
from rlsys.losses import Loss, LossInputs, TokenLoss
from rlsys.losses.measure import token_means
from rlsys.losses.sequences import log_ratio
from rlsys.registry import NonNegative, NonNegativeCount, Positive, UnitInterval


def expert_rows(inputs: LossInputs, name: str) -> Tensor:
    """bool [B, 1]. Raises LearnerError when nothing says which rows are demonstrations."""
    if inputs.expert is None:
        raise LearnerError(f"{name}: the batch does not say which rows are demonstrations")
    return inputs.expert[:, None]


def clipped_surrogate(inputs: LossInputs, low: float, high: float) -> Tensor:
    """PPO's, [B, T]."""
    ratio = log_ratio(inputs).exp()
    return torch.maximum(-inputs.advantages * ratio, -inputs.advantages * ratio.clamp(1 - low, 1 + high))


@dataclass
class SupervisedFineTuning(Loss):
    """Maximum likelihood of the demonstrations; rollouts of the policy play no part::

        L = -w * log pi          w = 1; (1 - beta) * sg(pi) with weight = one-token

    One-token rollout, arXiv:2509.26313, samples K tokens in the place of every demonstrated one and rewards a hit with
    1, a miss with beta < 0. Its expectation at temperature 1 is the weighted form, without sampling: -(1 - beta) * pi *
    grad log pi of the demonstrated token, up to terms that average to zero. That is dynamic fine-tuning
    (arXiv:2508.05629) but for the factor. Sampling at a temperature above 1 is left out.
    """

    name = "supervised"
    paper = "Ouyang et al. 2022, Training language models to follow instructions with human feedback, arXiv:2203.02155"
    needs_samples = False
    needs_expert = True

    weight: Literal["none", "one-token"] = "none"
    beta: float = -0.1

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        expert = inputs.mask & expert_rows(inputs, self.name)
        loss = -inputs.logprobs
        if self.weight == "one-token":
            loss = loss * (1 - self.beta) * inputs.logprobs.detach().exp()
        measured = {"sft/nll": -inputs.logprobs, "sft/probability": inputs.logprobs.exp()}
        return TokenLoss(loss.masked_fill(~expert, 0), token_means(expert, measured))


@dataclass
class Chord(Loss):
    """Reinforcement and demonstrations side by side, with a weight that moves from the one to the other::

        L = (1 - mu) * L_clip of the policy's rollouts + mu * phi * -log pi of the demonstrations
        phi = 1, or pi * (1 - pi), detached: neither what is known nor what is out of reach      with weight = phi
        mu: rises to `peak` over `warmup` steps, falls to `valley` over `decay` steps by a half cosine, stays

    Zhang et al. 2025, equations 3 to 6, as in the authors' code: CHORD-mu has peak 0.9, valley 0.05, decay 200;
    CHORD-phi a constant mu of 0.1. Both kinds of rows are averaged apart.
    """

    name = "chord"
    paper = "Zhang et al. 2025, On-Policy RL Meets Off-Policy Experts, arXiv:2508.11408"
    needs_expert = True
    expert_normalizer = "own"

    weight: Literal["none", "phi"] = "none"
    peak: UnitInterval = 0.9
    valley: UnitInterval = 0.05
    warmup: NonNegativeCount = 0
    decay: NonNegativeCount = 200
    low: UnitInterval = 0.2
    high: NonNegative = 0.2

    def mu(self, step: int) -> float:
        """The weight of the demonstrations at a step, from 0."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = min(1.0, (step - self.warmup) / self.decay) if self.decay else 1.0
        return (self.peak - self.valley) * 0.5 * (1 + math.cos(math.pi * done)) + self.valley

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        expert, mask = expert_rows(inputs, self.name), inputs.mask
        mu = self.mu(inputs.progress.step)
        probability = inputs.logprobs.detach().exp()
        phi = probability * (1 - probability) if self.weight == "phi" else torch.ones_like(probability)
        loss = torch.where(
            expert, -mu * phi * inputs.logprobs, (1 - mu) * clipped_surrogate(inputs, self.low, self.high)
        )
        metrics = token_means(mask & expert, {"sft/nll": -inputs.logprobs, "chord/phi": phi})
        metrics |= token_means(
            mask, {"chord/mu": torch.full(mask.shape, mu), "chord/expert": expert.expand(mask.shape)}
        )
        metrics |= token_means(mask & ~expert, {"policy/ratio": log_ratio(inputs).exp()})
        return TokenLoss(loss.masked_fill(~mask, 0), metrics)


@dataclass
class Hybrid(Loss):
    """Each prompt by what its solve rate asks for: reinforcement, or the demonstration::

        policy's rollouts   L = -A * rho                      nothing is clipped
        demonstrations      L = -coefficient * log pi

    Lv et al. 2025 (HPT), section 4. Which of the two a prompt keeps is decided by the adjustment `solve-rate-switch`.
    Both kinds of rows are averaged apart.
    """

    name = "hybrid"
    paper = "Lv et al. 2025, Towards a Unified View of Large Language Model Post-Training, arXiv:2509.04419"
    needs_expert = True
    expert_normalizer = "own"

    coefficient: NonNegative = 1.0

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        expert, mask = expert_rows(inputs, self.name), inputs.mask
        ratio = log_ratio(inputs).exp()
        loss = torch.where(expert, -self.coefficient * inputs.logprobs, -inputs.advantages * ratio)
        metrics = token_means(mask & expert, {"sft/nll": -inputs.logprobs})
        metrics |= token_means(mask, {"hpt/expert": expert.expand(mask.shape)})
        metrics |= token_means(mask & ~expert, {"policy/ratio": ratio})
        return TokenLoss(loss.masked_fill(~mask, 0), metrics)


@dataclass
class PolicyShaping(Loss):
    """Demonstrations in the group of the policy's rollouts, with a weight that favours what is unlikely::

        policy's rollouts   L = max(-A * rho, -A * clip(rho, 1 - low, 1 + high)),  or -A * rho with clip = false
        demonstrations      L = -A * f(pi),      f(p) = p / (p + gamma)            no ratio, no clip

    AMPO, Yuan et al. 2025, and Critique-GRPO, Zhang et al. 2025 (arXiv:2506.03106), both with gamma = 0.1; the shaping
    is LUFFY's, arXiv:2504.14945. The demonstration counts in the mean of its group.
    """

    name = "policy-shaping"
    paper = "Yuan et al. 2025, More Than One Teacher: Adaptive Multi-Guidance Policy Optimization, arXiv:2510.02227"
    needs_expert = True
    expert_in_group = True

    gamma: Positive = 0.1
    clip: bool = True
    low: UnitInterval = 0.2
    high: NonNegative = 0.2

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        expert, mask = expert_rows(inputs, self.name), inputs.mask
        probability = inputs.logprobs.clamp(max=0).exp()
        shaped = -inputs.advantages * probability / (probability + self.gamma)
        own = (
            clipped_surrogate(inputs, self.low, self.high)
            if self.clip
            else -inputs.advantages * log_ratio(inputs).exp()
        )
        metrics = token_means(mask & expert, {"sft/probability": probability, "sft/nll": -inputs.logprobs})
        metrics |= token_means(mask & ~expert, {"policy/ratio": log_ratio(inputs).exp()})
        return TokenLoss(torch.where(expert, shaped, own).masked_fill(~mask, 0), metrics)
