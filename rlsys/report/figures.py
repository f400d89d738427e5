"""Curves over the steps, one figure a metric: one line a group, with a band over its runs."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from rlsys.report.groups import Group
from rlsys.report.reading import Run, number

MOST_POINTS = 400  # of a curve: a longer one has means of so many steps
COLOURS: Sequence[str] = qualitative.D3

Row = Mapping[str, Any]
Value = Callable[[Row], float | None]


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure in plotly's JSON, and what people read above and below it. `note` says what is special about it."""

    title: str
    what: str
    figure: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a group: mean, smallest and largest of its runs that have the step, and how many those are.

    `every` steps are one point, the mean of them.
    """

    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    runs: Sequence[int]
    every: int = 1


def of(name: str) -> Value:
    return lambda row: number(row.get(name))


def share(name: str, whole: str) -> Value:
    """One figure as a part of another, in percent."""

    def value(row: Row) -> float | None:
        part, all_of_it = number(row.get(name)), number(row.get(whole))
        return None if part is None or not all_of_it else number(100 * part / all_of_it)

    return value


# Title, what it is, and where it comes from.
_LEARNING: Sequence[tuple[str, str, Value]] = (
    ("Reward", "mean score of the batch (reward/mean)", of("reward/mean")),
    ("Groups with a signal", "share of the prompts whose scores differ (groups/with_signal)", of("groups/with_signal")),
    ("Entropy", "of the policy, estimated from samples (learner/entropy_estimate)", of("learner/entropy_estimate")),
    ("Distance from the reference", "KL divergence per token, k3 (reference/kl_k3)", of("reference/kl_k3")),
    ("Gradient norm", "before clipping (learner/grad_norm)", of("learner/grad_norm")),
    (
        "Sampler and learner",
        "mean difference of their log-probs (learner/sampler_difference)",
        of("learner/sampler_difference"),
    ),
)  # fmt: skip
_SPEED: Sequence[tuple[str, str, Value]] = (
    ("Tokens generated", "per second (tokens/generated_per_s)", of("tokens/generated_per_s")),
    ("Tokens trained on", "per second (tokens/trained_per_s)", of("tokens/trained_per_s")),
    ("Time of a step", "seconds (time/step_s)", of("time/step_s")),
    ("Time in the learner", "seconds a step (time/learner_s)", of("time/learner_s")),
    (
        "Learner waited",
        "for rollouts, % of the step (wait/learner_for_rollouts_s)",
        share("wait/learner_for_rollouts_s", "time/step_s"),
    ),
    (
        "Generators waited",
        "for the learner, % of the step (wait/generators_for_learner_s)",
        share("wait/generators_for_learner_s", "time/step_s"),
    ),
)
_STALENESS: Sequence[tuple[str, str, Value]] = (
    ("Staleness", "versions, mean over the tokens (staleness/mean)", of("staleness/mean")),
    ("Largest staleness", "versions, of any token (staleness/max)", of("staleness/max")),
)
_LENGTHS: Sequence[tuple[str, str, Value]] = (
    ("Mean length", "response tokens (rollout/length_mean)", of("rollout/length_mean")),
    ("Longest response", "tokens (rollout/length_max)", of("rollout/length_max")),
    ("Cut at the limit", "share of the responses (rollout/truncated)", of("rollout/truncated")),
)


def sections(groups: Sequence[Group]) -> list[Section]:
    """What a run is looked at for first; panels without a single figure are left out."""
    lengths = [*_panels(groups, _LENGTHS), *_length_panel(groups)]
    found = [
        Section("Learning", [*_evaluation(groups), *_panels(groups, _LEARNING)]),
        Section("Throughput and waiting", _panels(groups, _SPEED)),
        Section("Staleness", _panels(groups, _STALENESS)),
        Section("Response lengths", lengths),
    ]
    return [section for section in found if section.panels]


def every_metric(groups: Sequence[Group]) -> dict[str, Mapping[str, Any]]:
    """A figure for each metric that any run has, by name."""
    names = sorted({name for group in groups for run in group.runs for row in run.steps for name in row} - {"step"})
    figures = {name: _figure(groups, lambda run: run.steps, of(name)) for name in names}
    return {name: figure for name, figure in figures.items() if figure is not None}


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def curve(runs: Sequence[Sequence[Row]], value: Value) -> Curve | None:
    """Over the rows of several runs; None where there is no figure at all."""
    found = [{int(row["step"]): v for row in rows if (v := value(row)) is not None} for rows in runs]
    steps = sorted(set().union(*found))
    if not steps:
        return None
    every = math.ceil(len(steps) / MOST_POINTS)
    points = []
    for first in range(0, len(steps), every):
        some = steps[first : first + every]
        means = [sum(own) / len(own) for run in found if (own := [run[step] for step in some if step in run])]
        points.append((sum(some) / len(some), sum(means) / len(means), min(means), max(means), len(means)))
    x, mean, low, high, count = zip(*points, strict=True)
    return Curve(x, mean, low, high, count, every)


def _panels(groups: Sequence[Group], wanted: Iterable[tuple[str, str, Value]]) -> list[Panel]:
    found = [(title, what, _figure(groups, lambda run: run.steps, value)) for title, what, value in wanted]
    return [Panel(title, what, figure) for title, what, figure in found if figure is not None]


def _evaluation(groups: Sequence[Group]) -> list[Panel]:
    counts = {int(n) for g in groups for run in g.runs for row in run.evals if (n := number(row.get("prompts")))}
    figure = _figure(groups, lambda run: run.evals, of("accuracy"), markers=True)
    if figure is None:
        return []
    problems = f"{min(counts):,} to {max(counts):,}" if len(counts) > 1 else f"{max(counts, default=0):,}"
    note = "Few problems make it jump: the evaluation of all of them counts." if len(counts) > 1 else ""
    return [Panel("Held-out accuracy", f"mean score of {problems} problems", figure, note)]


def _figure(
    groups: Sequence[Group], rows: Callable[[Run], Sequence[Row]], value: Value, markers: bool = False
) -> dict[str, Any] | None:
    figure = go.Figure()
    every = 1
    for place, group in enumerate(groups):
        found = curve([rows(run) for run in group.runs], value)
        if found is None:
            continue
        every = max(every, found.every)
        if max(found.runs) > 1:
            figure.add_scatter(
                x=[*found.steps, *reversed(found.steps)],
                y=_short([*found.high, *reversed(found.low)]),
                **{"fill": "toself", "fillcolor": colour(place), "opacity": 0.18, "line": {"width": 0}},
                **{"mode": "lines", "hoverinfo": "skip", "showlegend": False},
            )
        several = "<br>%{customdata[0]:.4g} to %{customdata[1]:.4g} in %{customdata[2]} runs"
        figure.add_scatter(
            x=list(found.steps),
            y=_short(found.mean),
            customdata=[_short(row) for row in zip(found.low, found.high, found.runs, strict=True)],
            name=html.escape(group.label),
            mode="lines+markers" if markers or len(found.steps) == 1 else "lines",
            line={"color": colour(place), "width": 2},
            hovertemplate="%{y:.4g}" + (several if len(group.runs) > 1 else ""),
        )
    if not figure.data:
        return None
    return _finished(figure, "step" if every == 1 else f"step (each point is the mean of {every})")


def _length_panel(groups: Sequence[Group]) -> list[Panel]:
    """How lengths are distributed in the first and in the last tenth of the steps."""
    figure = go.Figure()
    for place, group in enumerate(groups):
        for dash, shown, part in (("dot", "first", slice(0, 1)), ("solid", "last", slice(-1, None))):
            counts: dict[int, int] = {}
            for run in group.runs:
                steps = sorted(run.lengths)
                tenth = max(1, len(steps) // 10)
                for step in steps[:tenth] if part.start == 0 else steps[-tenth:]:
                    for length, count in run.lengths[step].items():
                        counts[length] = counts.get(length, 0) + count
            if not counts:
                continue
            x, y = _shares(counts)
            figure.add_scatter(
                x=x,
                y=_short(y),
                name=html.escape(f"{group.label}, {shown} tenth"),
                line={"color": colour(place), "width": 2, "dash": dash, "shape": "hvh"},
                mode="lines" if len(x) > 1 else "markers",
                hovertemplate="%{y:.3g} %",
            )
    if not figure.data:
        return []
    what = "% of the responses; dotted: the first tenth of the steps, solid: the last"
    return [Panel("Distribution of lengths", what, _finished(figure, "response tokens"))]


def _shares(counts: Mapping[int, int]) -> tuple[list[float], list[float]]:
    """Percent of the responses by length, in at most 60 bins: their middles, and their heights."""
    low, high = min(counts), max(counts)
    width = math.ceil((high - low + 1) / 60)
    bins = [0] * ((high - low) // width + 1)
    for length, count in counts.items():
        bins[(length - low) // width] += count
    total = sum(bins)
    return [low + width * i + (width - 1) / 2 for i in range(len(bins))], [100 * n / total for n in bins]


def _finished(figure: go.Figure, x_title: str) -> dict[str, Any]:
    """As plain JSON. The template is the same for all, and is kept once: `template`."""
    positive = all(value >= 0 for trace in figure.data for value in trace.y)
    figure.update_layout(
        height=240,
        margin={"l": 48, "r": 10, "t": 8, "b": 38},
        showlegend=False,
        hovermode="x",
        xaxis={"title": {"text": x_title, "font": {"size": 11}}, "zeroline": False},
        yaxis={"zeroline": False, "nticks": 6, "rangemode": "nonnegative" if positive else "normal"},
    )
    found: dict[str, Any] = json.loads(figure.to_json())
    found["layout"].pop("template", None)
    return found


def template() -> dict[str, Any]:
    """How all figures look."""
    found = json.loads(go.Figure(layout={"template": "plotly_white"}).to_json())
    return dict(found["layout"]["template"])


def _short(values: Iterable[float]) -> list[float]:
    """With as many digits as can be seen: the page is half as large."""
    return [float(f"{value:.5g}") for value in values]
