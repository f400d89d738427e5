"""Curricula: which prompt comes next, how often it is sampled and how, decided by the driver; one rule per file.

    driver: an open slot ──> choose(indices) ──> Choice(row, samples, temperature) ──> the prompt
    driver: a step ended ──> observe(what came of the prompts since the last one)

A draw has a number, its index, and what is drawn depends on the index and on what was observed up to the last step, not
on what was drawn in between. So nothing has to be undone when a run resumes: the ledger knows the choices of prompts
without a fate, and later ones are made from the memory of the checkpoint. With a bound of 0 a resumed run therefore
chooses what an uninterrupted one would have.

To add one, add a file with a dataclass that extends `Curriculum` and sets `name` and `paper`; its fields are its
options.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from rlsys.registry import Part
from rlsys.types import GroupInfo, Progress

KNOWN_ROWS = 1000  # rows of an endless source that are looked at for its categories and quantiles
TRIES = 1000  # rows of an endless source looked at for one of the kind that is wanted


@dataclass(frozen=True, slots=True)
class Choice:
    """One draw. The prompt's id is `"source/row@epoch"`, so no two draws may have the same row and epoch."""

    row: int
    epoch: str
    samples: int | None = None  # instead of rollout.samples_per_prompt
    temperature: float | None = None  # instead of rollout.temperature: the group is then an explored one
    prefix: tuple[int, ...] = ()  # tokens of a response that an earlier step has begun
    max_new_tokens: int | None = None  # instead of rollout.max_new_tokens


class Rows(Protocol):
    """The training prompts, as a curriculum sees them (`rlsys.prompts.stream.PromptStream`)."""

    @property
    def size(self) -> int | None:
        """Usable rows; None: endless, and every row is a new prompt."""
        ...

    def at(self, place: int) -> tuple[int, str]:
        """Row and epoch at place 0, 1, 2, ... of the seeded order."""
        ...

    def attribute(self, row: int, key: str) -> Any:
        """What the row's metadata have under the key. Raises DataError, naming the row, when they have nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one draw: a group that was trained, or dropped after it was scored."""

    choice: Choice
    info: GroupInfo
    advantage: float | None  # mean of |A| over its trained tokens; None: it was not trained
    value: float | None  # of the prompt by now, where the estimator tracks it

    @property
    def mean(self) -> float | None:
        """Of the scores; None when no rollout was scored."""
        scores = [score for score in self.info.scores if not math.isnan(score)]
        return sum(scores) / len(scores) if scores else None


class Curriculum(Part):
    """`bind` comes first. `observe` is called once a step, with draws in order of their index.

    `needs_repeats`: it is of use only where rows come again, which those of an endless source do not.
    `explores`: it asks for groups that are sampled at another temperature. `needs_values`: it goes by what the critic
    thinks of a prompt; before draws are made, `judged` is told of the rows that `candidates` has named for them.
    """

    needs_repeats: ClassVar[bool] = False
    explores: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False

    rows: Rows
    seed: int
    samples: int

    def bind(self, rows: Rows, seed: int, samples: int) -> None:
        """Look at the prompts. `samples` is rollout.samples_per_prompt. Raises DataError for a row without a key."""
        self.rows, self.seed, self.samples = rows, seed, samples

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        """What to draw as numbers `indices` of the run, rising."""
        raise NotImplementedError

    def candidates(self, indices: Sequence[int]) -> list[int]:
        """Rows to be judged by the critic before these draws are made."""
        return []

    def judged(self, values: Mapping[int, float]) -> None:
        """The critic's values of candidates, by row; they replace earlier ones."""

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        """Learn from a step; `metrics` are those it logged. Returns metrics to be logged beside them."""
        return {}

    # ---- for subclasses ----

    def rng(self, index: int) -> np.random.Generator:
        """Random numbers of one draw."""
        return np.random.default_rng([self.seed, index])

    def in_order(self, index: int) -> Choice:
        return Choice(*self.rows.at(index))

    def some(self, index: int) -> Iterator[int]:
        """Rows of an endless source that no other draw looks at, in a random order, to find one that is wanted."""
        first = int(self.rng(index).integers(TRIES))
        return (index * TRIES + (first + i) % TRIES for i in range(TRIES))

    def known(self) -> range | np.ndarray:
        """All rows, or the first ones of an endless source."""
        if self.rows.size is None:
            return range(KNOWN_ROWS)
        return np.array([self.rows.at(place)[0] for place in range(self.rows.size)])


def runs(indices: Sequence[int]) -> list[list[int]]:
    """The indices in runs of consecutive ones."""
    out: list[list[int]] = []
    for index in indices:
        if out and out[-1][-1] + 1 == index:
            out[-1].append(index)
        else:
            out.append([index])
    return out
