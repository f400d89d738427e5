"""Figures that look bad, told to whoever watches the run. A pure state machine: no clock, no I/O.

    skipped         a step, or updates of it, were not applied: a loss, a log-prob or a gradient was not finite
    entropy         its mean over the window is below a share of what it was over the first window
    length          responses are much longer than at the best evaluation, and the accuracy is lower than it was then
    stall           a step takes many times as long as those before it

What has been told is told again after `quiet_steps` steps at the earliest. Thresholds are those of `trackers.alerts`.
Nothing of this is kept in checkpoints: after a restart of the driver, `at first` is the step that it went on from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from rlsys.config.models import AlertsConfig

SHORTEST_STALL_S = 60.0  # a step that is late by less is nobody's concern
FEWEST_STEPS = 5  # whose median says how long a step takes


@dataclass(frozen=True, slots=True)
class Alert:
    title: str
    text: str


class Alerts:
    """Told of every step and every evaluation, in their order; returns what is to be reported."""

    def __init__(self, config: AlertsConfig) -> None:
        self._config = config
        self._step = 0
        self._told: dict[str, int] = {}  # kind -> the step at which it was reported last
        self._entropies: deque[float] = deque(maxlen=config.window)
        self._first_entropy: float | None = None
        self._best: tuple[float, float, int] | None = None  # accuracy, length and step of the best evaluation
        self._durations: deque[float] = deque(maxlen=config.window)

    def step(self, step: int, metrics: Mapping[str, float], skipped: str | None) -> list[Alert]:
        """A step was taken; `skipped` says why nothing was applied."""
        self._step = step
        if "time/step_s" in metrics:
            self._durations.append(metrics["time/step_s"])
        return [*self._skipped(metrics, skipped), *self._entropy(metrics)]

    def evaluated(self, step: int, figures: Mapping[str, float]) -> list[Alert]:
        """An evaluation after `step`: `rlsys.driver.evaluation.summarize`."""
        if self._config.length_growth is None or not {"accuracy", "length_mean"} <= figures.keys():
            return []
        accuracy, length = figures["accuracy"], figures["length_mean"]
        if self._best is None or accuracy >= self._best[0]:
            self._best = accuracy, length, step
            return []
        best, then, at = self._best
        if accuracy >= best - self._config.accuracy_drop or length <= self._config.length_growth * then:
            return []
        return self._tell(
            "length",
            "responses grow while the accuracy falls",
            f"held-out accuracy {accuracy:.1%} after step {step}, and {best:.1%} after step {at}; "
            f"mean length of the responses {length:.0f} tokens, and {then:.0f} then. The reward may be paid for length",
        )

    def waiting(self, seconds: float) -> list[Alert]:
        """No step since so many seconds."""
        if self._config.stall is None or len(self._durations) < FEWEST_STEPS:
            return []
        usual = median(self._durations)
        if seconds <= max(SHORTEST_STALL_S, self._config.stall * usual):
            return []
        text = f"no step for {seconds:.0f} s after step {self._step}; usually one takes {usual:.1f} s"
        return self._tell("stall", "the run stalls", text)

    def _skipped(self, metrics: Mapping[str, float], skipped: str | None) -> list[Alert]:
        updates = metrics.get("learner/skipped_updates", 0.0)
        if skipped is not None:
            text = f"step {self._step}: {skipped}"
        elif updates:
            text = f"{updates:.0f} of the updates of step {self._step} were skipped; the log says why"
        else:
            return []
        return self._tell("skipped", "a step was not applied", text)

    def _entropy(self, metrics: Mapping[str, float]) -> list[Alert]:
        value = metrics.get("learner/entropy", metrics.get("learner/entropy_estimate"))
        if self._config.entropy is None or value is None:
            return []
        self._entropies.append(value)
        if len(self._entropies) < self._config.window:
            return []
        mean = fmean(self._entropies)
        if self._first_entropy is None:
            self._first_entropy = mean
        if mean >= self._config.entropy * self._first_entropy:
            return []
        return self._tell(
            "entropy",
            "the entropy has collapsed",
            f"{mean:.3g} nats over the last {self._config.window} steps up to step {self._step}, and "
            f"{self._first_entropy:.3g} at first: samples of a prompt are all alike, and nothing more is explored",
        )

    def _tell(self, kind: str, title: str, text: str) -> list[Alert]:
        last = self._told.get(kind)
        if last is not None and self._step < last + self._config.quiet_steps:
            return []
        self._told[kind] = self._step
        return [Alert(title, text)]
