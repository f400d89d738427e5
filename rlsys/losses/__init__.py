"""Losses, regularisers, off-policy corrections and aggregations: one published rule per file.

To add one, add a file to the package of its kind (`policy`, `corrections`, `regularizers`, `aggregations`) with a
dataclass that extends the base class below and sets `name` and `paper`; its fields are its options.

A loss returns one number per token. Aggregation is separate: it turns the mask of the *whole* batch into weights, so
that the loss of any subset of rows is `sum(per_token * weights)` and the gradient does not depend on how the batch is
cut.
Shapes: B rollouts (of one micro-batch; rows are never split), T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from rlsys.metrics import Metric


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch. Only `logprobs` and `entropy` carry a gradient. Natural logarithms, float32."""

    logprobs: Tensor  # [B, T], current policy
    behavior_logprobs: Tensor  # [B, T], the policy that sampled the token
    proximal_logprobs: Tensor  # [B, T], the policy that ratios are taken against (behaviour unless decoupled)
    reference_logprobs: Tensor | None  # [B, T]
    entropy: Tensor | None  # [B, T], of the current policy; None unless asked for
    advantages: Tensor  # [B, T]
    mask: Tensor  # bool [B, T]


@dataclass(frozen=True, slots=True)
class TokenLoss:
    per_token: Tensor  # [B, T], 0 where masked
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class _Part:
    name: ClassVar[str]
    paper: ClassVar[str]
    needs_reference: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False


class Loss(_Part):
    """The policy loss."""

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        raise NotImplementedError


class Correction(_Part):
    """A detached weight [B, T] on the policy loss that accounts for tokens sampled by another policy."""

    needs_proximal: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        """`per_token` is the weight, 1 where nothing is to be corrected."""
        raise NotImplementedError


class Regularizer(_Part):
    """A term added to the policy loss, or (with `in_reward`) taken off the token rewards."""

    in_reward: bool = False

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        """The loss term, its coefficient included."""
        raise NotImplementedError

    def reward(self, behavior_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The token reward [B, T] to add, its coefficient included. Only for `in_reward`."""
        raise NotImplementedError


class Aggregation(_Part):
    """How per-token losses of the whole batch become one number."""

    def __call__(self, mask: Tensor) -> Tensor:
        """Weights float32 [B, T] for the mask of the whole batch, 0 where masked; rows without a token do not count."""
        raise NotImplementedError
