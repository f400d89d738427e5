"""What the corrections by importance share: the ratio of the proximal to the behaviour policy."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.losses import LossInputs


def importance(inputs: LossInputs) -> Tensor:
    """exp(clamp(log pi_prox - log pi_behav, -20, 20)) [B, T], detached; 1 where masked."""
    log_ratio = (inputs.proximal_logprobs - inputs.behavior_logprobs).detach().clamp(-20, 20)
    return torch.where(inputs.mask, log_ratio.exp(), 1.0)
