"""The decoupled PPO objective."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.losses import Correction, LossInputs, TokenLoss
from rlsys.losses.corrections.importance import importance
from rlsys.losses.measure import token_max, token_means
from rlsys.registry import Positive


@dataclass
class Decoupled(Correction):
    """Separate the policy that sampled from the policy that bounds the step::

        L = (pi_prox / pi_behav) * L_clip(pi / pi_prox)

    pi_prox is the learner's policy at the start of the step, so that stale tokens do not start outside the clipping
    bounds. The weight is not truncated; with `cap`, tokens whose weight is larger are left out (weight 0), as in AReaL,
    arXiv:2505.24298. `truncated-importance` differs in what it does with large weights.
    """

    name = "decoupled"
    paper = "Hilton et al. 2021, Batch size-invariance for policy optimization, arXiv:2110.00641"
    needs_proximal = True

    cap: Positive | None = None

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        raw = importance(inputs)
        over = raw > (float("inf") if self.cap is None else self.cap)
        weight = raw.masked_fill(over, 0)
        metrics = token_means(inputs.mask, {"correction/weight": weight, "correction/left_out": over}) | token_max(
            inputs.mask, {"correction/weight_max": raw}
        )
        return TokenLoss(weight, metrics)
