"""Easy prompts first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rlsys.curricula import TRIES, Choice, Curriculum, Rows, Seen
from rlsys.errors import DataError
from rlsys.registry import Count
from rlsys.types import Progress


@dataclass
class Staged(Curriculum):
    """The run in stages of equal length, each with its share of the prompts by difficulty::

        s = floor(stages * step / steps)
        rows of stage s: those whose difficulty is between the quantiles s / stages and (s + 1) / stages

    `key` names the metadata that hold the difficulty, a number (`metadata_keys` of the source; the built-in sums have
    `terms`). With `descending` the largest come first, for keys that grow with ease, such as a score gap; with
    `cumulative` a stage has the rows of the stages before it, too. Of an endless source the quantiles are those of its
    first 1000 rows. What a stage has is drawn again and again in an order of its own.
    """

    name = "staged"
    paper = "Bengio et al. 2009, Curriculum Learning, ICML"

    key: str = "difficulty"
    stages: Count = 3
    descending: bool = False
    cumulative: bool = False

    def bind(self, rows: Rows, seed: int, samples: int) -> None:
        super().bind(rows, seed, samples)
        known = np.asarray(self.known())
        sizes = np.array([self._difficulty(int(row)) for row in known])
        order = np.argsort(sizes, kind="stable")
        cuts = [round(len(order) * s / self.stages) for s in range(self.stages + 1)]
        if min(np.diff(cuts)) < 1:
            raise DataError(f"algorithm.curriculum.stages: {self.stages} stages, but only {len(known)} prompts")
        self._rows = [known[order[low:high]] for low, high in pairwise(cuts)]
        ordered = sizes[order]
        self._bounds = [(ordered[low], ordered[high - 1]) for low, high in pairwise(cuts)]

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        stage = min(self.stages - 1, int(self.stages * progress.step / progress.steps))
        first = 0 if self.cumulative else stage
        return [Choice(self._row(index, first, stage), f"d{index}") for index in indices]

    def _row(self, index: int, first: int, last: int) -> int:
        if self.rows.size is not None:
            rows = np.concatenate(self._rows[first : last + 1])
            epoch, place = divmod(index, len(rows))
            return int(rows[np.random.default_rng([self.seed, first, last, epoch]).permutation(len(rows))[place]])
        low, high = self._bounds[first][0], self._bounds[last][1]
        for row in self.some(index):
            if low <= self._difficulty(row) <= high:
                return row
        raise DataError(f"no prompt with {self.key} from {low:g} to {high:g} among {TRIES} of an endless source")

    def _difficulty(self, row: int) -> float:
        """Smaller is earlier."""
        value = self.rows.attribute(row, self.key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(f"algorithm.curriculum.key: {self.key!r} of row {row} is {value!r}, not a number")
        return -float(value) if self.descending else float(value)

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        sizes: list[Any] = [self.rows.attribute(one.choice.row, self.key) for one in seen]
        return {"curriculum/difficulty": float(np.mean(sizes))} if sizes else {}
