"""Procedural tasks of the reasoning-gym library."""

from __future__ import annotations

import dataclasses

from rlsys.config.models import ReasoningGymSource
from rlsys.errors import ConfigError
from rlsys.prompts import RawPrompt
from rlsys.registry import nearest


class ReasoningGymRows:
    """Row i is the data set's entry i. The metadata carries what the reward function `reasoning_gym` needs."""

    generated = True

    def __init__(self, config: ReasoningGymSource) -> None:
        from reasoning_gym.factory import DATASETS, create_dataset

        key = "prompts: reasoning_gym"
        if config.dataset not in DATASETS:
            hint = nearest(config.dataset, list(DATASETS)) or f"; there are {', '.join(sorted(DATASETS))}"
            raise ConfigError(f"{key}: no data set {config.dataset!r}{hint}")
        options = [f.name for f in dataclasses.fields(DATASETS[config.dataset][1]) if f.name not in ("size", "seed")]
        for parameter in config.parameters:
            if parameter in ("size", "seed"):
                raise ConfigError(f"{key}: parameters.{parameter}: set `{parameter}` of the source itself")
            if parameter not in options:
                raise ConfigError(
                    f"{key}: {config.dataset!r} has no parameter {parameter!r}{nearest(parameter, options)}; "
                    f"it has {', '.join(options)}"
                )
        self._parameters = {**config.parameters, "size": config.size, "seed": config.seed}
        try:
            self._dataset = create_dataset(config.dataset, **self._parameters)
        except (AssertionError, ValueError, TypeError) as error:  # what the library's own checks raise
            raise ConfigError(f"{key}: {config.dataset!r} refuses its parameters: {error}") from None
        self.name = config.dataset if config.seed == 0 else f"{config.dataset}-{config.seed}"
        self.task = config.task
        self.size = config.size
        self._config = config

    def row(self, i: int) -> RawPrompt:
        entry = self._dataset[i]
        answer = entry["answer"]
        return RawPrompt(
            content=entry["question"],
            answer=None if answer is None else str(answer),
            metadata={"dataset": self._config.dataset, "parameters": self._parameters, "entry": entry},
        )

    def where(self, i: int) -> str:
        return f"reasoning-gym {self._config.dataset} entry {i}"
