"""Old log-probs from the learner instead of from the sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.losses import Correction, LossInputs, TokenLoss
from rlsys.losses.corrections.importance import importance
from rlsys.losses.measure import token_means


@dataclass
class Recompute(Correction):
    """The ratio of the loss against log-probs that the learner recomputes at the start of the step, and no weight::

        L = L_clip(pi / pi_prox)

    What the samplers' own log-probs say is ignored, so tokens of older weights, or of another temperature, are treated
    as if the policy at the start of the step had sampled them. `decoupled` has the weight that corrects this.
    """

    name = "recompute"
    paper = "Sheng et al. 2024, HybridFlow: A Flexible and Efficient RLHF Framework, arXiv:2409.19256"
    needs_proximal = True

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        metrics = token_means(inputs.mask, {"correction/weight": importance(inputs)})
        return TokenLoss(torch.ones_like(inputs.logprobs), metrics)
