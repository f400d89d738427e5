"""Typed metrics, reduced late: a mean keeps its sum and count until the step is logged, so there are no means of means.

Example::

    a = {"loss": Mean.of([1.0, 2.0])}
    b = {"loss": Mean.of([6.0])}
    reduce(merge([a, b]))  # {"loss": 3.0}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Mean:
    """Weighted mean; NaN-free by construction: an empty mean is left out of the log."""

    total: float
    weight: float

    @staticmethod
    def of(values: Iterable[float]) -> Mean:
        values = list(values)
        return Mean(float(sum(values)), float(len(values)))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


@dataclass(frozen=True, slots=True)
class Sum:
    total: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float | None:
        return self.total


@dataclass(frozen=True, slots=True)
class Max:
    maximum: float

    def __add__(self, other: Max) -> Max:
        return Max(max(self.maximum, other.maximum))

    def value(self) -> float | None:
        return self.maximum


@dataclass(frozen=True, slots=True)
class Min:
    minimum: float

    def __add__(self, other: Min) -> Min:
        return Min(min(self.minimum, other.minimum))

    def value(self) -> float | None:
        return self.minimum


@dataclass(frozen=True, slots=True)
class Last:
    """A gauge: the newest value wins."""

    latest: float

    def __add__(self, other: Last) -> Last:
        return other

    def value(self) -> float | None:
        return self.latest


Metric = Mean | Sum | Max | Min | Last
Metrics = Mapping[str, Metric]


def merge(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """Combine metrics of the same names; a name with two kinds of metric is a TypeError."""
    out: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            if name not in out:
                out[name] = metric
                continue
            held = out[name]
            if type(held) is not type(metric):
                raise TypeError(f"metric {name!r} is both {type(held).__name__} and {type(metric).__name__}")
            add: Any = type(held).__add__  # of their common kind, which mypy cannot see
            out[name] = add(held, metric)
    return out


def reduce(metrics: Metrics) -> dict[str, float]:
    """Final numbers, by name; empty means are left out."""
    values = ((name, metric.value()) for name, metric in metrics.items())
    return {name: float(value) for name, value in values if value is not None}
