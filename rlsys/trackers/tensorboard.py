"""TensorBoard: event files in RUN/tensorboard, with the same names as everywhere. `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.roles import SampleRow
from rlsys.trackers import TrackerError


class TensorboardTracker:
    """Raises TrackerError when the package `tensorboard` is not there."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError(f"trackers.tensorboard needs the package tensorboard: {error}") from error
        self._directory = str(directory / "tensorboard")
        self._open = SummaryWriter
        self._writer = SummaryWriter(self._directory)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._scalars(step, metrics)

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        self._scalars(step, {f"eval/{name}": value for name, value in metrics.items()})
        if scores:
            self._writer.add_histogram("eval/scores", np.asarray(scores), step)

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        for place, row in enumerate(rows):
            text = f"**{row.prompt_id}, score {row.score:g}, {row.fate}**\n\n" + _quoted(row.prompt + row.response)
            self._writer.add_text(f"samples/{place}", text, step)

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        """Events are in the timeline."""

    def incident(self, title: str, text: str) -> None:
        """Incidents are in the ledger."""

    def resumed(self, step: int) -> None:
        """A new file that hides what was logged for later steps."""
        self._writer.close()
        self._writer = self._open(self._directory, purge_step=step + 1)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def _quoted(text: str) -> str:
    """As it is, in Markdown: indented lines."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
