"""The built-in task: add a few numbers, writing down each running sum.

prompt    17+5+23=
response  22,45
answer    45
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return "+".join(map(str, self.terms)) + "="

    @property
    def answer(self) -> int:
        return sum(self.terms)


def problem(seed: int, row: int, terms: tuple[int, int], largest: int, held_out: bool = False) -> Sum:
    """Problem number `row` of the endless set number `seed`.

    One in five of all possible problems, chosen by a hash, is kept for held-out sets and is in no other.
    """
    rng = random.Random(f"sums/{seed}/{row}")
    while True:
        sum_ = Sum(tuple(rng.randint(1, largest) for _ in range(rng.randint(*terms))))
        if (zlib.crc32(sum_.prompt.encode()) % 5 == 0) == held_out:
            return sum_


def demonstration(problem: Sum, wrong_step: float, rng: random.Random) -> str:
    """A worked response in which each running sum is wrong with probability `wrong_step` (and is then gone on from)."""
    total = problem.terms[0]
    steps = []
    for term in problem.terms[1:]:
        total += term
        if rng.random() < wrong_step:
            total = max(0, total + rng.choice([-2, -1, 1, 2]))
        steps.append(str(total))
    return ",".join(steps)


def demonstrations(seed: int, terms: tuple[int, int], largest: int, wrong_step: float) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) pairs; their problems come from a set of their own."""
    rng = random.Random(f"demonstrations/{seed}")
    row = 0
    while True:
        sum_ = problem(-1 - seed, row, terms, largest)
        yield sum_.prompt, demonstration(sum_, wrong_step, rng)
        row += 1
