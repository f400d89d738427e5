"""Advantage estimators: one published rule per file, each a pure function on `[B, T]` tensors.

To add one, add a file with a dataclass that extends `Estimator` and sets `name`; its fields are its options.
Shapes: B rollouts, T response tokens; `mask` is True on the tokens that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from rlsys.metrics import Metric


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """One batch, as float32 / bool / int64 torch tensors on the CPU."""

    scores: Tensor  # [B], sequence rewards: the score plus KL in the reward; 0 where not scored (such rows are masked)
    scored: Tensor  # bool [B]
    token_rewards: Tensor  # [B, T], the same by token: the score is on the last trained token
    mask: Tensor  # bool [B, T]
    group: Tensor  # int64 [B], rows of one prompt share a number 0, 1, 2, ...
    behavior_logprobs: Tensor  # [B, T]
    reference_logprobs: Tensor | None  # [B, T]
    values: Tensor | None  # [B, T], critic's value before each token
    prompt_ids: tuple[str, ...]  # of each row, for estimators that keep per-prompt state


@dataclass(frozen=True, slots=True)
class Advantages:
    advantages: Tensor  # float32 [B, T], 0 where masked
    returns: Tensor | None = None  # float32 [B, T], the critic's targets
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Estimator:
    """Base of all estimators. Stateful ones keep their state in `state_dict`."""

    name: ClassVar[str]
    paper: ClassVar[str]
    needs_values: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint has some: {sorted(state)}")
