"""The built-in worked sums: endless unless limited, and every row a fresh problem."""

from __future__ import annotations

import random

from rlsys.config.models import SumsSource
from rlsys.errors import ConfigError
from rlsys.prompts import RawPrompt
from rlsys.prompts.sums import demonstration, problem

_FEWEST_PROBLEMS = 50


class SumsRows:
    generated = True

    def __init__(self, config: SumsSource) -> None:
        if config.terms[0] > config.terms[1]:
            raise ConfigError(f"prompts: terms = {list(config.terms)}: the fewest terms come first")
        fewest, most = config.terms
        problems = sum(config.largest**terms for terms in range(fewest, most + 1))
        if problems < _FEWEST_PROBLEMS:
            raise ConfigError(
                f"prompts: terms = {list(config.terms)} and largest = {config.largest} make only {problems} different "
                f"sums; there must be {_FEWEST_PROBLEMS}, so that there are some to train on and some to hold out"
            )
        # Two sequences of problems must not share prompt ids.
        self.name = "sums" + ("-held-out" if config.held_out else "") + (f"-{config.seed}" if config.seed else "")
        self.task = config.task
        self.size = config.limit
        self._config = config

    def row(self, i: int) -> RawPrompt:
        config = self._config
        sum_ = problem(config.seed, i, config.terms, config.largest, config.held_out)
        return RawPrompt(
            content=sum_.prompt,
            answer=str(sum_.answer),
            metadata={"terms": len(sum_.terms)},
            demonstration=demonstration(sum_, 0.0, random.Random(0)),
        )

    def where(self, i: int) -> str:
        return f"sums problem {i}"
