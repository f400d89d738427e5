"""Truncated importance sampling."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.losses import Correction, LossInputs, TokenLoss
from rlsys.losses.corrections.importance import importance
from rlsys.losses.measure import token_max, token_means
from rlsys.registry import Positive


@dataclass
class TruncatedImportance(Correction):
    """Weigh each token by how likely the learner, at the start of the step, finds it; large weights are cut::

        w = min(pi_prox / pi_behav, cap)

    The policy ratio is then pi / pi_prox: what staleness and the sampler's own arithmetic changed is in w, what this
    step changed is in the ratio. Truncation bounds the variance and biases towards the behaviour policy, as in V-trace
    (Espeholt et al. 2018, section 4.1); Yao et al. 2025 use it for the difference between sampler and learner.
    """

    name = "truncated-importance"
    paper = "Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    needs_proximal = True

    cap: Positive = 2.0

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        raw = importance(inputs)
        metrics = token_means(
            inputs.mask, {"correction/weight": raw.clamp(max=self.cap), "correction/truncated": raw > self.cap}
        ) | token_max(inputs.mask, {"correction/weight_max": raw})
        return TokenLoss(raw.clamp(max=self.cap), metrics)
