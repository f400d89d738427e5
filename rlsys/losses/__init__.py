"""Losses, regularisers, off-policy corrections and aggregations: one published rule per file.

To add one, add a file to the package of its kind (`policy`, `corrections`, `regularizers`, `aggregations`) with a
dataclass that extends the base class below and sets `name` and `paper`; its fields are its options.

A loss returns one number per token. Aggregation is separate: it turns the mask of the *whole* batch into weights, so
that the loss of any subset of rows is `sum(per_token * weights)` and the gradient does not depend on how the batch is
cut. A part that needs to see more than its own row looks at the whole batch in `prepare`, before the update, and leaves
itself numbers per token in `extras`. For a loss that couples sequences, with s_i = sum_t log pi(y_it), that is exact:
`prepare` computes dL/ds_i from the current log-probs, and the loss of a token is `dL/ds_i * log pi`.
Shapes: B rollouts (of one micro-batch; rows are never split), T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from rlsys.metrics import Metric
from rlsys.registry import Part
from rlsys.types import START, Progress


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
    group: Tensor | None = None  # int64 [B], rows of one prompt share a number; complete groups in `prepare` only
    expert: Tensor | None = None  # bool [B], demonstrations, with log-probs that mean nothing; None: there are none
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # [B, T] each, by name
    progress: Progress = START


@dataclass(frozen=True, slots=True)
class TokenLoss:
    per_token: Tensor  # [B, T], 0 where masked
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class _Part(Part):
    needs_reference: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False  # of the current policy, with a gradient, in `__call__`
    needs_proximal: ClassVar[bool] = False  # log-probs recomputed by the learner at the start of the step
    needs_current: ClassVar[bool] = False  # log-probs of the current policy in `prepare`: a forward pass an update
    needs_current_entropy: ClassVar[bool] = False  # the same with its entropy
    needs_extras: ClassVar[tuple[str, ...]] = ()  # names that the estimator or an adjustment has to provide

    def prepare(self, inputs: LossInputs) -> Mapping[str, Tensor]:
        """Extras [B, T] from all rows of an update, before it; groups are whole. Without a gradient.

        `logprobs` and `entropy` are the current policy's where `needs_current` and `needs_current_entropy` ask for
        them; else `logprobs` are the proximal ones and `entropy` is None. Memory may change here and nowhere else: it
        is called once an update, with the same numbers on every rank.
        """
        return {}


class Loss(_Part):
    """The policy loss."""

    needs_samples: ClassVar[bool] = True  # the policy's own; False: demonstrations are enough
    needs_expert: ClassVar[bool] = False  # one demonstration per prompt
    expert_in_group: ClassVar[bool] = False  # demonstrations count in the statistics of their group
    expert_normalizer: ClassVar[Literal["shared", "own"]] = "shared"  # "own": aggregated apart from the other rows

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        raise NotImplementedError


class Correction(_Part):
    """A detached weight [B, T] on the policy loss that accounts for tokens sampled by another policy."""

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        """`per_token` is the weight, 1 where nothing is to be corrected."""
        raise NotImplementedError


class Regularizer(_Part):
    """A term added to the policy loss, or (with `in_reward`) taken off the token rewards."""

    in_reward: bool = False

    def __call__(self, inputs: LossInputs) -> TokenLoss:
        """The loss term, its coefficient included."""
        raise NotImplementedError

    def reward(self, behavior_logprobs: Tensor, reference_logprobs: Tensor | None, mask: Tensor) -> Tensor:
        """The token reward [B, T] to add, its coefficient included. Only for `in_reward`."""
        raise NotImplementedError


class Aggregation(Part):
    """How per-token losses of the whole batch become one number."""

    def __call__(self, mask: Tensor) -> Tensor:
        """Weights float32 [B, T] for the mask of the whole batch, 0 where masked; rows without a token do not count."""
        raise NotImplementedError
