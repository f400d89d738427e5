"""Rewards of named functions, shaped into one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Combiner, Estimate
from rlsys.advantages.combiners.ensemble import component
from rlsys.metrics import Last, Mean, Metric, merge
from rlsys.registry import NonNegative, Positive, UnitInterval


@dataclass
class ConstraintMask(Combiner):
    """A calibrated reward, for responses that break no rule and stay near the reference::

        v = 1 if every constraint is at least 1/2, else 0
        r = v * sigmoid(R - R_baseline) * max(0, 1 - sum_t(log pi_behav - log pi_ref) / kl_max)

    CGPO, Xu et al. 2024, section 4 (CRPG): R and R_baseline (of a response of the initial policy to the same prompt)
    and the constraints are reward functions, by name; no baseline: sigmoid(R).
    """

    name = "constraint-mask"
    paper = "Xu et al. 2024, The Perfect Blend: Redefining RLHF with Mixture of Judges, arXiv:2409.20370"
    unverified = "known from a pull request to another library; kl_max is a guess"
    needs_reference = True

    reward: str = "reward"
    baseline: str | None = None
    constraints: tuple[str, ...] = ()
    kl_max: Positive = 20.0

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        assert inputs.reference_logprobs is not None
        quality = component(inputs, self.reward, self.name)
        if self.baseline is not None:
            quality = quality - component(inputs, self.baseline, self.name)
        kept = torch.ones(len(quality), dtype=torch.bool)
        for constraint in self.constraints:
            kept &= component(inputs, constraint, self.name) >= 0.5
        distance = ((inputs.behavior_logprobs - inputs.reference_logprobs) * inputs.mask).sum(1).double()
        near = (1 - distance / self.kl_max).clamp(min=0)
        out = estimate(kept * torch.sigmoid(quality) * near)
        counted = float(inputs.scored.sum())
        metrics: dict[str, Metric] = {
            "cgpo/satisfied": Mean(float((kept & inputs.scored).sum()), counted),
            "cgpo/nearness": Mean(float(near[inputs.scored].sum()), counted),
        }
        return replace(out, metrics=merge([out.metrics, metrics]))


@dataclass
class ConfidenceCalibration(Combiner):
    """A verbalised confidence is rewarded for good answers and punished for bad ones::

        s: confidence in (0, 10) parsed from the response, 5 if there is none;    c = s / 10 - 1/2
        r = clip(score, -bound, bound);     avg <- rate * mean(r) + (1 - rate) * avg, before it is used
        threshold   r + weight * |r| * c  where r >= avg,  r - weight * |r| * c  elsewhere
        difference  r + weight * (r - avg) * c

    PPO-C, Leng et al. 2024, as in the authors' code: weight = 0.5, rate = 0.1, bound = 10. The reward function should
    leave the confidence out of what it scores.
    """

    name = "confidence-calibration"
    paper = "Leng et al. 2024, Taming Overconfidence in LLMs: Reward Calibration in RLHF, arXiv:2410.09724"
    needs_components = False

    adjustment: Literal["threshold", "difference"] = "threshold"
    weight: NonNegative = 0.5
    rate: UnitInterval = 0.1
    bound: Positive = 10.0
    pattern: str = r"[Cc]onfidence:?\s*(\d+(?:\.\d+)?)"
    average: float | None = field(default=None, init=False)

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        compiled = re.compile(self.pattern)
        found = [compiled.findall(text) for text in inputs.texts] or [[]] * len(inputs.scores)
        stated = torch.tensor([min(10.0, float(f[-1])) if f else 5.0 for f in found], dtype=torch.float64)
        confidence = stated / 10 - 0.5
        scores = inputs.scores.double().clamp(-self.bound, self.bound)
        if inputs.scored.any():
            mean = float(scores[inputs.scored].mean())
            self.average = mean if self.average is None else self.rate * mean + (1 - self.rate) * self.average
        average = self.average or 0.0
        if self.adjustment == "difference":
            calibrated = scores + self.weight * (scores - average) * confidence
        else:
            push = self.weight * scores.abs() * confidence
            calibrated = torch.where(scores >= average, scores + push, scores - push)
        out = estimate(calibrated)
        metrics: dict[str, Metric] = {
            "ppo-c/average": Last(average),
            "ppo-c/confidence": Mean(float(stated[inputs.scored].sum()), float(inputs.scored.sum())),
        }
        return replace(out, metrics=merge([out.metrics, metrics]))

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average = state["average"]


@dataclass
class VerifierShaped(Combiner):
    """A reward model ranks, but any right answer is better than any wrong one::

        r = sigmoid(alpha * r_model) + (r_verifier - 1)

    Qwen2.5-Math, Yang et al. 2024, section 3.2, alpha = 0.5.
    """

    name = "verifier-shaped"
    paper = "Yang et al. 2024, Qwen2.5-Math Technical Report, arXiv:2409.12122"

    model: str = "model"
    verifier: str = "verifier"
    alpha: Positive = 0.5

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        model = component(inputs, self.model, self.name)
        return estimate(torch.sigmoid(self.alpha * model) + component(inputs, self.verifier, self.name) - 1)
