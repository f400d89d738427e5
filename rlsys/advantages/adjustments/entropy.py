"""Adjustments by the policy's entropy at the start of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Last, Mean, Metric
from rlsys.registry import NonNegative, Positive, UnitInterval

LOG_2 = math.log(2)


def _row_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass
class EntropyBonus(Adjustment):
    """Advantages rise where the policy is uncertain, but never change their sign::

        A <- A + min(alpha * H, |A| / kappa)      H: entropy of the token, detached

    The exploration term of FunRL, Hao et al. 2025, in the form of Cheng et al. 2025 (arXiv:2506.14758): alpha = 0.4,
    kappa = 2.
    """

    name = "entropy-bonus"
    paper = "Hao et al. 2025, Exploring Superior Function Calls via Reinforcement Learning, arXiv:2508.05118"
    unverified = "form and values are those of a closely related published rule"
    needs_entropy = True

    alpha: NonNegative = 0.4
    kappa: Positive = 2.0

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        assert inputs.entropy is not None
        given = advantages.advantages
        bonus = torch.minimum(self.alpha * inputs.entropy, given.abs() / self.kappa) * inputs.mask
        metrics = {"fun-rl/bonus": Mean(float(bonus.sum()), float(inputs.mask.sum()))}
        return replace(advantages, advantages=given + bonus, metrics=metrics)


@dataclass
class EntropyScore(Adjustment):
    """How uncertain a token is among the tokens of the batch, from -1 (certain) to 1; the advantages stay::

        x = log H;   z = (x - q) / sqrt(mean (x - q)^2),   q the `pivot`-quantile of x over the batch
        h = z / max(z) where z > 0,   z / |min(z)| elsewhere

    Liu et al. 2025 (HAPO), pivot = 0.8. The loss `heterogeneous-clip` works with it. The paper also samples with a
    temperature that follows h token by token, which vLLM's sampler has no place for: that part is left out.
    """

    name = "entropy-score"
    paper = (
        "Liu et al. 2025, From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token, arXiv:2509.16591"
    )
    unverified = (
        "the released code makes certain tokens positive; here the sign is as described. No adaptive temperature"
    )
    needs_entropy = True
    provides = ("entropy_score",)

    pivot: UnitInterval = 0.8

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        assert inputs.entropy is not None
        mask = inputs.mask
        score = torch.zeros(mask.shape)
        if mask.any():
            x = inputs.entropy[mask].double().clamp(min=1e-8).log()
            centred = x - float(np.quantile(x.numpy(), self.pivot))  # torch's takes 16 million numbers at most
            deviation = centred.square().mean().sqrt()
            z = centred / deviation if deviation > 1e-9 else torch.zeros_like(centred)
            above, below = float(z.max()), float(z.min())
            scaled = torch.where(z > 0, z / max(above, 1e-9), z / max(-below, 1e-9))
            score[mask] = scaled.float()
        metrics = {"hapo/uncertain_tokens": Mean(float((score > 0).sum()), float(mask.sum()))}
        extras = {**advantages.extras, "entropy_score": score}
        return replace(advantages, extras=extras, metrics=metrics)


@dataclass
class EntropyFilter(Adjustment):
    """Responses of high entropy do not count, once the policy has settled, and the others pay for theirs::

        H_i = mean_t H of the response;    start = mean H of the first batch
        A_i <- A_i - gamma * H_i;   and no training on response i  where start < limit and H_i > limit

    Simoni et al. 2025 (GTPO), equation 6: gamma = 0.1, limit = log 2. After `conflict-tokens` its factor holds for the
    whole of A_i - gamma * H_i. The authors' code filters from the first step on, with limit = 0.7.
    """

    name = "entropy-filter"
    paper = "Simoni et al. 2025, GTPO: Trajectory-Based Policy Optimization in Large Language Models, arXiv:2508.03772"
    needs_entropy = True

    gamma: NonNegative = 0.1
    limit: Positive = LOG_2
    start: float | None = field(default=None, init=False)

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        assert inputs.entropy is not None
        mask = inputs.mask
        mean = _row_means(inputs.entropy, mask)
        trained = mask.any(1)
        if self.start is None and trained.any():
            self.start = float(mean[trained].mean())
        scattered = trained & (mean > self.limit) & (self.start is not None and self.start < self.limit)
        kept = mask & ~scattered[:, None]
        price = self.gamma * mean[:, None] * advantages.extras.get("conflict_factor", torch.ones(mask.shape))
        adjusted = (advantages.advantages - price) * kept
        metrics: dict[str, Metric] = {
            "gtpo/filtered": Mean(float(scattered.sum()), float(trained.sum())),
            "gtpo/entropy": Mean(float(mean[trained].sum()), float(trained.sum())),
            "gtpo/start_entropy": Last(self.start or 0.0),
        }
        return replace(advantages, advantages=adjusted, mask=kept, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.start = state["start"]
