"""A user's own rule."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.segments import Partition
from rlsys.types import Rollout


@dataclass
class Python(Partition):
    """What a Python function says::

        cuts = function(pieces, probabilities)      texts and probabilities of the tokens

    `path` is "package.module:function" or "rules.py:function". It returns rising places from 0 to T - 1; a rule that
    raises, or returns something else, costs the prompt, not the run.
    """

    name = "python"
    paper = "Guo et al. 2025, Segment Policy Optimization, arXiv:2505.23564"
    needs_text = True

    path: str = ""

    def __post_init__(self) -> None:
        if ":" not in self.path:
            raise ValueError(f"path {self.path!r} is not of the form module:function")
        self._function: Callable[..., Sequence[int]] | None = None

    def boundaries(self, rollout: Rollout, pieces: Sequence[str]) -> Sequence[int]:
        import numpy as np

        if self._function is None:
            self._function = _load(self.path)
        probabilities: list[float] = np.exp(rollout.behavior_logprobs).tolist()
        return self._function(pieces, probabilities)


def _load(path: str) -> Any:
    where, _, name = path.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)
    spec = importlib.util.spec_from_file_location(f"rlsys_partition_{Path(where).stem}", where)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
