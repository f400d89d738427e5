"""Segments: how a prompt is rolled out beyond plain sampling, and where responses are cut.

    sample ──> branch ──> sample the branches ──> branch ... ──> score what is to be scored ──> assemble
               strategy   any generator           until none     reward worker                  one group with segments

A strategy is asked after every round of sampling what to sample next; a branch is a prompt that ends with the beginning
of a response. When there is nothing more, it says which rollouts have to be scored, and makes one group of it all whose
rollouts carry `Segment`s with values. A partition says where a response is cut. Both work on plain values, in the
reward workers; the driver passes handles and branches on.

To add one, add a file with a dataclass that extends `Strategy` or `Partition` and sets `name` and `paper`; its fields
are its options.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, Protocol

import numpy as np

from rlsys.errors import SegmentError
from rlsys.registry import Part
from rlsys.roles import Branch, Sampling
from rlsys.types import Prompt, Rollout, RolloutGroup, ScoredGroup

Rounds = Sequence[Sequence[RolloutGroup]]  # the group of the prompt itself, then the groups of each round of branches


class Pieces(Protocol):
    """The tokenizer, as far as it is needed here."""

    def __call__(self, token_ids: np.ndarray) -> list[str]:
        """The text of each token."""
        ...

    def encode(self, text: str) -> list[int]: ...


class Partition(Part):
    """Where responses are cut."""

    needs_text: ClassVar[bool] = False

    def boundaries(self, rollout: Rollout, pieces: Sequence[str]) -> Sequence[int]:
        """Places to cut before, rising, from 0 to T - 1: the segment at place b begins with token b.

        `pieces` are the texts of the tokens where `needs_text`, else empty.
        """
        raise NotImplementedError


class Strategy(Part):
    """`bind` comes first. `branches`: there is more than one round, and rollouts come with segments."""

    branches: ClassVar[bool] = False
    defers: ClassVar[bool] = False  # its branches are prompts of later steps
    uses_partition: ClassVar[bool] = False
    needs_demonstration: ClassVar[bool] = False

    partition: Partition
    max_new_tokens: int
    pieces: Pieces | None = None

    def bind(self, partition: Partition, max_new_tokens: int, pieces: Pieces | None = None) -> None:
        """`max_new_tokens` is rollout.max_new_tokens, of a whole response. Raises ConfigError for what cannot fit."""
        self.partition, self.max_new_tokens, self.pieces = partition, max_new_tokens, pieces

    def start(self, prompt: Prompt) -> Prompt:
        """What is sampled for a prompt that was drawn: with the beginning of a response, perhaps."""
        return prompt

    def first(self, sampling: Sampling) -> Sampling:
        """The sampling of the first round."""
        return sampling

    def branch(self, rounds: Rounds) -> list[Branch]:
        """What to sample next; nothing when that was all. Raises SegmentError for a partition that goes wrong."""
        return []

    def to_score(self, rounds: Rounds) -> list[RolloutGroup]:
        """Groups whose rollouts are all to be scored."""
        return [rounds[0][0]]

    def assemble(self, rounds: Rounds, scored: Sequence[ScoredGroup]) -> ScoredGroup:
        """One group out of everything; `scored` answers `to_score`."""
        return scored[0]

    def expected_tokens(self, samples: int) -> float:
        """Most tokens that a prompt costs, all rounds together."""
        return float(samples * self.max_new_tokens)

    # ---- for subclasses ----

    def encoded(self, text: str) -> np.ndarray:
        """Token ids, int32."""
        if not text:
            return np.zeros(0, np.int32)
        assert self.pieces is not None
        return np.array(self.pieces.encode(text), np.int32)

    def cut(self, rollout: Rollout) -> list[int]:
        """The partition's boundaries, checked."""
        wanted = self.partition.needs_text and self.pieces is not None
        pieces = self.pieces(rollout.token_ids) if wanted and self.pieces is not None else []
        try:
            found = [int(b) for b in self.partition.boundaries(rollout, pieces)]
        except SegmentError:
            raise
        except Exception as error:  # a user's rule may raise anything; it costs this prompt, not the run
            raise SegmentError(
                f"{self.partition.name} raised {type(error).__name__} on {rollout.prompt_id}#{rollout.sample}: {error}"
            ) from error
        length = len(rollout.token_ids)
        if any(b < 0 or b >= length for b in found) or any(b <= a for a, b in pairwise(found)):
            raise SegmentError(
                f"{self.partition.name} cuts {rollout.prompt_id}#{rollout.sample}, of {length} tokens, at {found}: "
                f"boundaries must rise, from 0 to {length - 1}"
            )
        return found


async def scored(
    strategy: Strategy | None, rounds: Rounds, score: Callable[[RolloutGroup], Awaitable[ScoredGroup]]
) -> ScoredGroup:
    """Score what has to be scored, all at once, and make one group of it. Without a strategy: the group as it is."""
    if strategy is None:
        return await score(rounds[0][0])
    found = await asyncio.gather(*(score(group) for group in strategy.to_score(rounds)))
    return strategy.assemble(rounds, found)


def with_prefix(prompt: Prompt, prefix: np.ndarray) -> Prompt:
    """The prompt with (more of) the beginning of a response."""
    ids = np.concatenate([prompt.token_ids, prefix]).astype(np.int32)
    return replace(prompt, token_ids=ids, prefix_tokens=prompt.prefix_tokens + len(prefix), demonstration=None)


def continued(prompt: Prompt, name: str, prefix: np.ndarray) -> Prompt:
    """The prompt with the beginning of a response. Its samples have seeds of their own."""
    return replace(
        with_prefix(prompt, prefix),
        id=f"{prompt.id}/{name}",
        seed=(prompt.seed + 1_000_003 * (1 + hash_of(name))) % 2**62,
    )


def hash_of(name: str) -> int:
    """A small number that depends on the text alone."""
    out = 0
    for byte in name.encode():
        out = (out * 257 + byte) % 1_000_000_007
    return out


def prefix_of(prompt: Prompt) -> np.ndarray:
    """The tokens that `continued` has added, int32."""
    return prompt.token_ids[len(prompt.token_ids) - prompt.prefix_tokens :]
