"""Advantage estimators, and what stands before and after them: one published rule per file.

    reward components -> combiner -> scores -> estimator -> adjustments -> advantages

- an `Estimator` (modules of this package) turns scores into advantages;
- a `Combiner` (`combiners`) makes one signal of several reward components;
- an `Adjustment` (`adjustments`) changes advantages, or takes tokens out of the training.

To add one, add a file to the package of its kind with a dataclass that extends the base class below and sets `name` and
`paper`; its fields are its options. All of them run once a batch, on all rows, on the CPU.
Shapes: B rollouts, T response tokens, K reward components; `mask` is True on the tokens that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from rlsys.metrics import Metric
from rlsys.registry import Part
from rlsys.types import START, Progress, RolloutBatch


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """One batch, as float32 / bool / int64 torch tensors on the CPU.

    `scored` is False for rows that are to count in no statistics: those whose reward failed, greedy baselines, and
    demonstrations unless the loss wants them in the group (`Loss.expert_in_group`).
    """

    scores: Tensor  # [B], sequence rewards: the score plus KL in the reward; 0 where there is none (a masked row)
    scored: Tensor  # bool [B]
    token_rewards: Tensor  # [B, T], the same by token: the score is on the last trained token
    mask: Tensor  # bool [B, T]
    group: Tensor  # int64 [B], rows of one prompt share a number 0, 1, 2, ...
    behavior_logprobs: Tensor  # [B, T]
    reference_logprobs: Tensor | None  # [B, T]
    values: Tensor | None  # [B, T], critic's value before each token
    prompt_ids: tuple[str, ...]  # of each row, for estimators that keep per-prompt state
    # of the policy at the start of the step, [B, T]; given to parts that ask for it
    proximal_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    # of each token's log-prob p_y in the output projection alone, [B, T, 3], with u = e_y - p and h the hidden state:
    # |h|^2, |u|^2, u^T (diag(p) - p p^T) u
    curvature: Tensor | None = None
    rescored: Tensor | None = None  # [B', T'], log-probs of the rows that `Estimator.replay` asked for
    token_ids: Tensor | None = None  # int64 [B, T], 0 in the padding
    texts: tuple[str, ...] = ()  # [B], responses
    tasks: tuple[str, ...] = ()  # [B]
    components: Tensor | None = None  # [B, K], NaN where a reward function has no value
    component_names: tuple[str, ...] = ()  # [K]
    finished: Tensor | None = None  # bool [B], False: cut at the length limit; None: all finished
    expert: Tensor | None = None  # bool [B], demonstrations; None: there are none
    greedy: Tensor | None = None  # bool [B], greedy baselines, whose `scores` are real though `scored` is False
    # int8 [B], 1 sampled at a higher temperature than is trained at, -1 at a lower one, in groups of their own
    explored: Tensor | None = None
    # [B, T, 4], of each token's segment: start value, end value, spread (NaN: none), 1 where it is to be trained
    segments: Tensor | None = None
    progress: Progress = START


@dataclass(frozen=True, slots=True)
class Advantages:
    """`mask` may take tokens out of the training, never add any. `extras` are for the loss (`LossInputs.extras`)."""

    advantages: Tensor  # float32 [B, T], 0 where masked
    returns: Tensor | None = None  # float32 [B, T], the critic's targets
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    mask: Tensor | None = None  # bool [B, T]; None: as in the inputs
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # float32 [B, T] each


class Estimator(Part):
    """Base of all estimators."""

    needs_values: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_proximal: ClassVar[bool] = False  # `proximal_logprobs`
    needs_entropy: ClassVar[bool] = False  # `entropy`
    needs_greedy: ClassVar[bool] = False  # one greedy rollout per prompt
    needs_segments: ClassVar[bool] = False  # `segments`
    provides: ClassVar[tuple[str, ...]] = ()  # names of its `extras`

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        raise NotImplementedError

    def prompt_value(self, prompt_id: str) -> float | None:
        """What is expected of the prompt's next score, where that is tracked."""
        return None

    def replay(self, batch: RolloutBatch) -> RolloutBatch | None:
        """Rows of earlier batches whose log-probs under the policy at the start of this step are wanted, too."""
        return None


class Estimate(Protocol):
    """Runs the estimator on scores [B] in the place of the weighted sum of the components."""

    def __call__(self, scores: Tensor, *, penalties: bool = True) -> Advantages:
        """`penalties`: with what regularisers add to the rewards, such as the KL."""
        ...


class Combiner(Part):
    """Makes one signal of the reward components."""

    needs_components: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    estimates_often: ClassVar[bool] = False  # calls `estimate` more than once, so the estimator must be without memory

    def __call__(self, inputs: AdvantageInputs, estimate: Estimate) -> Advantages:
        """`inputs.scores` are the weighted sum of the components, without penalties."""
        raise NotImplementedError


class Adjustment(Part):
    """Changes what the estimator found."""

    needs_reference: ClassVar[bool] = False
    needs_proximal: ClassVar[bool] = False
    needs_entropy: ClassVar[bool] = False
    needs_curvature: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    takes_explored: ClassVar[bool] = False  # deals with groups of another temperature
    provides: ClassVar[tuple[str, ...]] = ()

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        """`inputs.mask` is what is left of the mask. Extras and returns of `advantages` are to be passed on."""
        raise NotImplementedError
