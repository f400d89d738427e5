"""The rollout strategy of an algorithm, with what it has to know of the rest of the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlsys.algorithms.compose import Algorithm
from rlsys.config.models import Config
from rlsys.models.loading import load_tokenizer
from rlsys.models.staging import staged
from rlsys.segments import Strategy


def bound_strategy(algorithm: Algorithm, config: Config, model_path: str | Path) -> Strategy:
    """The strategy with what it has to know of the config. Raises ConfigError for what cannot fit."""
    algorithm.rollout.bind(algorithm.partition, config.rollout.max_new_tokens, TokenTexts(str(model_path)))
    return algorithm.rollout


class TokenTexts:
    """The text of each token; the tokenizer is loaded where it is first asked."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._tokenizer: Any = None

    def __call__(self, token_ids: np.ndarray) -> list[str]:
        return [self._loaded.decode([int(token)], skip_special_tokens=True) for token in token_ids]

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._loaded.encode(text, add_special_tokens=False)
        return found

    @property
    def _loaded(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(staged(self._model_path, weights=False))
        return self._tokenizer
