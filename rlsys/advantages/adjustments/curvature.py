"""Tokens whose own step would go too far."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Max, Mean, Metric
from rlsys.registry import NonNegative, Positive


@dataclass
class CurvatureMask(Adjustment):
    """No training on tokens that would move the objective or the policy too far, by a model of the step to come::

        W: the output projection alone, p = softmax(W h),  u = e_y - p,  F = diag(p) - p p^T
        gradient of a token  g = A * u h^T;      its step  d = rate * g
        m_H = <g, d> + A * ((u^T d h)^2 - (d h)^T F (d h)) / 2        shift of the objective, to second order
            = rate * A^2 |u|^2 |h|^2 + rate^2 * A^3 |h|^4 * (|u|^4 - u^T F u) / 2
        m_F = (u^T d h)^2 / 2 = (rate * A |u|^2 |h|^2)^2 / 2            shift of the policy
        trained: |m_H| < objective and m_F < policy        0 <= m_H < objective, without `symmetric`

    Melo et al. 2025 (CAPO): objective = 0.01, policy = 1e-4, rate = 1.5e-5; terms as in the authors' code. d is the
    step of plain gradient descent, one of the optimisers that the authors model: then three numbers of the output
    projection are enough for each token. Their default models Adam, with moments of its own for the projection, which
    takes sampling with a small top-k. Set `rate` to `learner.optimizer.learning_rate`. The policy is that of the start
    of the step, so the model is exact with one update a step.
    """

    name = "curvature-mask"
    paper = (
        "Melo et al. 2025, Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning, "
        "arXiv:2510.00819"
    )
    unverified = "the bounds were found with a model of Adam; here the step is modelled as plain gradient descent"
    needs_curvature = True

    objective: Positive = 0.01
    policy: Positive = 1e-4
    rate: NonNegative = 1.5e-5
    symmetric: bool = True

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        assert inputs.curvature is not None
        mask, given = inputs.mask, advantages.advantages.double()
        norm, square, spread = inputs.curvature.double().masked_fill(~mask[:, :, None], 0).unbind(-1)
        shift = self.rate * given.square() * square * norm
        shift = shift + (self.rate * norm).square() * given.pow(3) * (square.square() - spread) / 2
        divergence = (self.rate * given * square * norm).square() / 2
        inside = (shift < self.objective) & (shift > -self.objective if self.symmetric else shift >= 0)
        kept = mask & inside & (divergence < self.policy)
        count = float(mask.sum())
        metrics: dict[str, Metric] = {"capo/rejected": Mean(count - float(kept.sum()), count)}
        for name, values in (("objective_shift", shift.abs()), ("policy_shift", divergence)):
            metrics[f"capo/{name}"] = Mean(float(values.sum()), count)
            if count:
                metrics[f"capo/{name}_max"] = Max(float(values.max()))
        return replace(advantages, advantages=advantages.advantages * kept, mask=kept, metrics=metrics)
