"""docs/segments.md and docs/segments.png, from the runs of the study of segments."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Run = Mapping[str, Any]
AXES = {"tokens": "sampled tokens", "seconds": "wall time, seconds"}
FEWEST = 3  # runs of which a difference may be said to be one
ABLATED = {  # what is compared beside the runs of the method itself, and how that one is called there
    "cutpoint interval": ("spo-chain", "every 4"),
    "continuations": ("spo-chain", "4 continuations"),
    "probability mask": ("spo-chain", "mask"),
    "tree shape": ("spo-tree", "4-4"),
}


def write(runs: Sequence[Run], tasks: Mapping[str, Any], page: Path) -> None:
    """Nothing without runs."""
    whole = [run for run in runs if not run["error"]]
    names = list(dict.fromkeys(run["name"] for run in whole))
    whole.sort(key=lambda run: names.index(run["name"]))  # one order, and one colour, for all tasks
    methods = {
        task: _by_name([run for run in whole if run["task"] == task and run["group"] == "methods"]) for task in tasks
    }
    methods = {task: found for task, found in methods.items() if found}
    if not methods:
        return
    _plot(methods, tasks, page.with_suffix(".png"))
    lines = [
        "# Credit by segment: what it buys",
        "",
        "Written by `python -m benchmarks.segments` from `benchmarks/results/segments.jsonl`.",
        "",
        "The quickstart's model, fitted to worked sums of which a third of the steps are wrong, learns to take the "
        "right ones. Every token that is sampled counts, those of branches and continuations, too. A case has as many "
        "steps as make up some 200,000 tokens; accuracies are read off between evaluations (800 responses each, "
        "temperature 1) where the shortest of the runs compared ends, in tokens and in seconds. Learning rate 3e-4 "
        "(over the square root of the updates in a step), bound on staleness 1, no KL, PPO's clip of 0.2 (for RLOO, "
        "too, which loses accuracy without it at this staleness), temperature 1 for all; the real "
        "driver, vLLM, reward worker and DeepSpeed learner, in one process on two cores, where prefixes are too short "
        "for the prefix cache to hold. Chain_sum is scored as the library does, with partial credit for an answer that "
        "has the right one in it, so its percentages are mean scores. ± is the standard deviation over the seeds, † a "
        f"difference to the first line of more than two standard errors, where there are {FEWEST} runs or more.",
        "",
        "![accuracy over tokens and time](segments.png)",
    ]
    for task, found in methods.items():
        lines += ["", f"## {tasks[task].title.capitalize()}", "", *_table(found, "grpo")]
    for group, (method, own) in ABLATED.items():
        found = _by_name([run for run in whole if run["group"] == group])
        base = methods.get("sums", {}).get(method)
        if found and base:
            seeds = {run["seed"] for runs in found.values() for run in runs}
            compared = {own: [run for run in base if run["seed"] in seeds], **found}
            # Not in seconds: these run after the methods, on a machine that may have become slower or faster.
            lines += ["", f"## {group.capitalize()} ({method}, sums)", "", *_table(compared, own, ["tokens"])]
    if broken := [
        f"- `{run['task']} {run['name']}` seed {run['seed']}: {run['error']}" for run in runs if run["error"]
    ]:
        lines += ["", "## Broken off", "", *broken]
    page.write_text("\n".join(lines) + "\n")


def accuracy_at(run: Run, axis: str, place: float) -> float:
    """On the line between the evaluations around `place`; the last one's after the end."""
    points = [(float(found[axis]), float(found["accuracy"])) for found in run["evals"]]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def shortest(by_name: Mapping[str, Sequence[Run]], axis: str) -> float:
    """Where the shortest of all runs ends."""
    return min(float(run["evals"][-1][axis]) for runs in by_name.values() for run in runs)


def _by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    out: dict[str, list[Run]] = {}
    for run in runs:
        out.setdefault(run["name"], []).append(run)
    return out


def _table(by_name: Mapping[str, Sequence[Run]], base: str, axes: Sequence[str] = tuple(AXES)) -> list[str]:
    """One column for each of `axes`; the speed where one is of seconds."""
    ends = {axis: shortest(by_name, axis) for axis in axes}
    timed = "seconds" in axes
    heads = ["", "runs", "before", *(f"after {ends[axis]:,.0f} {axis}" for axis in axes)]
    heads += ["tokens a second"] * timed + ["trained, of sampled"]
    rows = [_row(heads), _row(["---"] * len(heads))]
    found = {
        name: {axis: [100 * accuracy_at(run, axis, ends[axis]) for run in runs] for axis in axes}
        for name, runs in by_name.items()
    }
    verdicts: dict[str, list[str]] = {axis: [] for axis in axes}
    for name, values in found.items():
        runs = by_name[name]
        cells = [
            f"{_spread(values[axis])}{_mark(values[axis], found.get(base, values)[axis]) if name != base else ''}"
            for axis in axes
        ]
        for axis, cell in zip(axes, cells, strict=True):
            if base in found and cell.endswith("†"):
                better = statistics.fmean(values[axis]) > statistics.fmean(found[base][axis])
                verdicts[axis].append(f"`{name}` is {'better' if better else 'worse'}")
        last = [run["evals"][-1] for run in runs]
        speed = statistics.fmean([end["tokens"] / end["seconds"] for end in last])
        trained = statistics.fmean([run["trained"] / end["tokens"] for run, end in zip(runs, last, strict=True)])
        before = 100 * statistics.fmean([run["evals"][0]["accuracy"] for run in runs])
        rows.append(_row([name, len(runs), f"{before:.1f}%", *cells, *[f"{speed:,.0f}"] * timed, f"{trained:.0%}"]))
    if min(map(len, by_name.values())) < FEWEST:
        return rows
    said = [
        f"at equal {AXES[axis].split(', ')[0]} {', '.join(verdicts[axis]) or 'no difference is seen'}" for axis in axes
    ]
    return [*rows, "", f"Beside `{base}`: {'; '.join(said)}."]


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}%" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _mark(values: Sequence[float], base: Sequence[float]) -> str:
    if min(len(values), len(base)) < FEWEST:
        return ""
    error = math.sqrt(statistics.variance(values) / len(values) + statistics.variance(base) / len(base))
    return " †" if abs(statistics.fmean(values) - statistics.fmean(base)) > 2 * error else ""


def _plot(methods: Mapping[str, Mapping[str, Sequence[Run]]], tasks: Mapping[str, Any], path: Path) -> None:
    """Mean and range over the seeds; one row for each task, one column for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(methods), 2, figsize=(10, 3.6 * len(methods)), squeeze=False, sharey="row", layout="constrained"
    )
    for row, (task, by_name) in zip(axes, methods.items(), strict=True):
        for axis, (unit, label) in zip(row, AXES.items(), strict=True):
            end = shortest(by_name, unit)
            places = [end * i / 20 for i in range(21)]
            for number, (name, runs) in enumerate(by_name.items()):
                values = [[100 * accuracy_at(run, unit, place) for run in runs] for place in places]
                colour = f"C{number}"
                axis.fill_between(
                    places, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.12, lw=0
                )
                axis.plot(places, [statistics.fmean(v) for v in values], color=colour, lw=1.8, label=name)
            axis.set_xlabel(label)
            axis.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
            axis.locator_params(axis="x", nbins=5)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("accuracy, %")
        row[0].set_title(tasks[task].title, fontsize=10, loc="left")
        row[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
