"""Prompts as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.curricula import Choice, Curriculum
from rlsys.types import Progress


@dataclass
class InOrder(Curriculum):
    """Every row once an epoch, in a seeded order (`prompts.shuffle`)::

        row(i) = permutation_e[i mod n]      e = floor(i / n)

    of a source of n rows. An endless source is taken row by row.
    """

    name = "in-order"
    paper = "Bottou 2012, Stochastic Gradient Descent Tricks, Neural Networks: Tricks of the Trade"

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        return [self.in_order(index) for index in indices]
