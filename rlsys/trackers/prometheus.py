"""Live figures for Prometheus: gauges that the agents of the Ray cluster export; launch/ has a dashboard of them.

Names come from the definitions of the metrics: `reward/mean` is `rlsys_reward_mean`, which Ray exports as
`ray_rlsys_reward_mean`; the tag `run` is the name of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlsys.metrics.catalog import find, prometheus_name
from rlsys.roles import SampleRow


class PrometheusTracker:
    """Gauges are made when they are first set, by when the process must have joined the cluster."""

    def __init__(self, run: str) -> None:
        """`run` is the name of the run."""
        from ray.util.metrics import Gauge

        self._make = Gauge
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._set(metrics)

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        self._set({f"eval/{name}": value for name, value in metrics.items()})

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Samples are no numbers."""

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        """Events are in the timeline."""

    def incident(self, title: str, text: str) -> None:
        """Restarts and refusals are counted in the metrics."""

    def resumed(self, step: int) -> None:
        """What was live then was so."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The gauges end with the process."""

    def _set(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self._gauges:
                definition = find(name)
                description = f"{name}: {definition.read if definition else 'not defined'}"
                self._gauges[name] = self._make(prometheus_name(name), description, ("run",))
            self._gauges[name].set(value, self._tags)
