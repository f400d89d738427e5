"""Rewards: what a response is worth.

    RolloutGroup -> RewardWorker.score -> ScoredGroup

The reward functions run in a child process of the worker (`child`), which is killed and started anew when one hangs.
This module holds what a reward function is made of and stays light, because every child imports it.

To add a reward function, add a file to `functions/` with a dataclass that extends `RewardFunction` and sets `name`; its
fields are its options. A function of your own needs no file here: use `kind: python` with its import path.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

# A number, or named components of which "score" is the number that counts.
Value = float | Mapping[str, float]
LARGEST = 3.4e38  # of a score or component: they travel on as float32


@dataclass(frozen=True, slots=True)
class Sample:
    """One response, as a reward function sees it."""

    prompt: str  # the text the model saw, chat template included
    response: str
    answer: str | None  # reference answer of the row
    metadata: Mapping[str, Any]  # of the row
    token_ids: array[int]  # of the response; not NumPy, whose import would be half of a child's start
    truncated: bool  # cut at the length limit
    task: str
    prompt_id: str
    sample: int  # 0, 1, ... within its group


class RewardFunction:
    """Base of all reward functions. Lives in the child process; built and pickled by the worker."""

    name: ClassVar[str]

    def prepare(self) -> None:
        """Import what scoring needs; called once in a fresh child, before the first sample.

        Raises RewardSetupError when the function cannot be used.
        """

    @property
    def is_async(self) -> bool:
        """Whether `score` returns an awaitable. Asked after `prepare`."""
        return False

    def score(self, sample: Sample) -> Value | Awaitable[Value]:
        """The reward of one response. What it raises is recorded with the rollout, which is then masked."""
        raise NotImplementedError
