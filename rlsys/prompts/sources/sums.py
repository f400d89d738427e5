"""The built-in worked sums: endless, and every row a fresh problem."""

from __future__ import annotations

from rlsys.config.models import SumsSource
from rlsys.errors import ConfigError
from rlsys.prompts import RawPrompt
from rlsys.prompts.sums import problem


class SumsRows:
    size: None = None
    generated = True

    def __init__(self, config: SumsSource) -> None:
        if config.terms[0] > config.terms[1]:
            raise ConfigError(f"prompts: terms = {list(config.terms)}: the fewest terms come first")
        # Two sets of problems must not share prompt ids.
        self.name = "sums" if config.seed == 0 else f"sums-{config.seed}"
        self.task = config.task
        self._config = config

    def row(self, i: int) -> RawPrompt:
        sum_ = problem(self._config.seed, i, self._config.terms, self._config.largest)
        return RawPrompt(sum_.prompt, str(sum_.answer))

    def where(self, i: int) -> str:
        return f"sums problem {i}"
