"""docs/learning.md and docs/learning.png, from the runs of the learning study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlsys.algorithms import describe

Run = Mapping[str, Any]
BASE = "grpo without KL"
HELD = 0.05  # nats that an entropy which is held may be off its target
WINDOW = 15  # last steps over which figures of single steps are averaged


def write(runs: Sequence[Run], page: Path) -> None:
    """Nothing without runs."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run["name"], []).append(run)
    if not by_name:
        return
    several = {name: found for name, found in by_name.items() if len(found) > 1}
    single = {name: found for name, found in by_name.items() if len(found) == 1}
    _plot(several, page.with_suffix(".png"))
    steps, evals = runs[0]["steps"], runs[0]["evals"]
    lines = [
        "# What learns, and what does not",
        "",
        "Written by `python -m benchmarks.learning` from `benchmarks/results/learning.jsonl`.",
        "",
        f"Every preset, as published, on one small task: sums of two to four terms by the quickstart's model, {steps} "
        f"steps of 256 sampled responses, learning rate 3e-4 (over the square root of the updates in a step), "
        "bound on staleness 1 unless said here or by the preset. "
        "The real driver, vLLM, reward worker, reference and DeepSpeed learner, in one process. Accuracy is on "
        f"{int(evals[0]['prompts'])} held-out problems, {int(evals[0]['rollouts'] / evals[0]['prompts'])} samples each "
        "at temperature 1; best of 8 is the share of problems that one of the eight solves. Presets whose samples per "
        "prompt is 1 have 256 prompts a step instead of 32; the sampled responses are the same in number.",
        "",
        "A model of 0.8 million parameters on sums says little about large models on hard problems: these runs are to "
        "find what is broken, and to see a method's own claim where it can be seen at this size. Hyperparameters are "
        "the papers', chosen for other models; a method that is behind here is not thereby worse.",
        "",
        "![accuracy over steps](learning.png)",
        "",
        "## With several seeds",
        "",
        *_table(several),
        "",
        "## Claims",
        "",
        *_claims(several),
        "",
        "## One run each",
        "",
        *_table(single),
    ]
    broken = [f"`{run['name']}` seed {run['seed']}: {run['error']}" for run in runs if run["error"]]
    fallen = [
        f"`{name}` ({len(lost)} of {len(found)})"
        for name, found in by_name.items()
        if (lost := [run for run in found if _after(run) < _before(run) - 0.05])
    ]
    lines += [
        "",
        "## Broken off, or worse than before",
        "",
        *([f"- {what}" for what in broken] or ["No run broke off."]),
        "",
        f"More than five points below the start at the end: {', '.join(fallen) or 'none'}.",
    ]
    page.write_text("\n".join(lines) + "\n")


# ---- figures of one run -------------------------------------------------------------------------------------------


def _before(run: Run) -> float:
    return float(run["evals"][0]["accuracy"])


def _after(run: Run) -> float:
    return float(run["evals"][-1]["accuracy"]) if run["evals"] else math.nan


def _best(run: Run) -> float:
    return float(run["evals"][-1].get("best_of_n", math.nan))


def _late(run: Run, metric: str) -> float:
    found = run["late"][metric][-WINDOW:]
    return statistics.fmean(found) if found else math.nan


def _entropy(run: Run) -> float:
    return _late(run, "learner/entropy_estimate")


def _signal(run: Run) -> float:
    return _late(run, "advantages/nonzero")


def _variation(run: Run) -> float:
    """Standard deviation over mean of the gradient's norm."""
    found = run["late"]["learner/grad_norm"]
    return statistics.stdev(found) / statistics.fmean(found) if len(found) > 1 else math.nan


def _steps_to(run: Run, accuracy: float) -> float:
    """First step at which a line between evaluations reaches the accuracy; one and a half times the run if never."""
    points = [(found["step"], found["accuracy"]) for found in run["evals"]]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= accuracy:
            return float(x1 if y0 >= accuracy or y1 == y0 else x0 + (x1 - x0) * (accuracy - y0) / (y1 - y0))
    return 1.5 * float(points[-1][0])


def _drop(run: Run) -> float:
    """From the best evaluation to the last."""
    return max(float(found["accuracy"]) for found in run["evals"]) - _after(run)


# ---- tables and sentences -----------------------------------------------------------------------------------------


def _table(by_name: Mapping[str, Sequence[Run]]) -> list[str]:
    rows = [
        "| | runs | accuracy before | after | change | best of 8 | entropy | tokens with an advantage |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    whole = {name: [run for run in runs if not run["error"]] for name, runs in by_name.items()}
    for name, runs in sorted(whole.items(), key=lambda item: -_mean(item[1], _after)):
        if not runs:
            rows.append(f"| {name} | 0 | broke off | | | | | |")
            continue
        change = [_after(run) - _before(run) for run in runs]
        rows.append(
            f"| {name} | {len(runs)} | {_mean(runs, _before):.1%} | {_spread(runs, _after)} "
            f"| {100 * statistics.fmean(change):+.1f} | {_mean(runs, _best):.0%} | {_mean(runs, _entropy):.2f} "
            f"| {_mean(runs, _signal):.0%} |"
        )
    return rows


def _claims(by_name: Mapping[str, Sequence[Run]]) -> list[str]:
    def compare(what: str, one: str, other: str, measure: Callable[[Run], float], more: bool, shown: str) -> str:
        a, b = by_name.get(one, []), by_name.get(other, [])
        if len(a) < 2 or len(b) < 2:
            return f"- {what}: not enough runs yet."
        x, y = [measure(run) for run in a], [measure(run) for run in b]
        error = math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))
        gap = (statistics.fmean(x) - statistics.fmean(y)) * (1 if more else -1)
        verdict = "seen here" if gap > 2 * error else "the opposite here" if gap < -2 * error else "not seen here"
        return (
            f"- {what}: **{verdict}** ({one} {statistics.fmean(x):{shown}}, {other} {statistics.fmean(y):{shown}}, "
            f"standard error of the difference {error:{shown}})."
        )

    def held(name: str, target: float) -> str:
        runs = by_name.get(name, [])
        if len(runs) < 2:
            return f"- AEPO holds the entropy at {target}: not enough runs yet."
        off = statistics.fmean([abs(_entropy(run) - target) for run in runs])
        verdict = "seen here" if off < HELD else "not seen here"
        return (
            f"- AEPO holds the entropy at {target}: **{verdict}** (it ends at {_mean(runs, _entropy):.2f}, off by "
            f"{off:.2f} on average; {BASE} ends at {_mean(by_name.get(BASE, []), _entropy):.2f})."
        )

    level = _mean(by_name[BASE], _after) - 0.02 if BASE in by_name else 0.3
    lines = [
        "A difference counts as seen when it is more than two standard errors.",
        "",
        held("aepo", 0.5),
        held("aepo, target 0.7", 0.7),
        compare("Knapsack RL gives more of what is sampled a signal", "knapsack-rl", BASE, _signal, True, ".2f"),
        compare(
            "Single-stream SPO gives more of what is sampled a signal", "spo-single-stream", BASE, _signal, True, ".2f"
        ),
        compare("RiskPO keeps the best of 8 higher", "riskpo", BASE, _best, True, ".3f"),
        compare("RiskPO keeps the entropy higher", "riskpo", BASE, _entropy, True, ".3f"),
        compare("BNPO's gradient varies less", "bnpo", BASE, _variation, False, ".3f"),
    ]
    for name in ("sec", "pcl"):
        what = f"{name.upper()} reaches {level:.1%} in fewer steps of equal size"
        lines.append(compare(what, name, BASE, lambda run: _steps_to(run, level), False, ".1f"))
    reference = "reference" in describe("gtpo").needs
    lines.append(
        f"- GTPO needs no reference: **{'it has one' if reference else 'true by construction'}**; its runs end "
        f"{_mean(by_name.get('gtpo', []), _after):.1%} (started at {_mean(by_name.get('gtpo', []), _before):.1%})."
    )
    for name in by_name:
        if name.endswith(", staleness 4") and name != "ppo, staleness 4":
            what = f"At staleness 4 `{name.split(',')[0]}` loses less from its best evaluation to the end than PPO"
            lines.append(compare(what, name, "ppo, staleness 4", _drop, False, ".3f"))
    return lines


def _mean(runs: Sequence[Run], measure: Callable[[Run], float]) -> float:
    return statistics.fmean([measure(run) for run in runs]) if runs else math.nan


def _spread(runs: Sequence[Run], measure: Callable[[Run], float]) -> str:
    found = [measure(run) for run in runs]
    return f"{statistics.fmean(found):.1%}" + (f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else "")


def _plot(by_name: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Mean and range over the seeds of the accuracy, one small panel each, with the base in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in by_name if name != BASE]
    if not names:
        return
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.3 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )

    def draw(axis: Any, runs: Sequence[Run], colour: str) -> None:
        whole = [run for run in runs if not run["error"]]
        if not whole:
            return
        steps = [found["step"] for found in whole[0]["evals"]]
        values = [[100 * run["evals"][i]["accuracy"] for run in whole] for i in range(len(steps))]
        axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.25, lw=0)
        axis.plot(steps, [statistics.fmean(v) for v in values], color=colour, lw=1.8)

    for axis, name in zip(axes.flat, names, strict=False):
        draw(axis, by_name.get(BASE, []), "0.6")
        draw(axis, by_name[name], "C0")
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for row in axes:
        row[0].set_ylabel("accuracy, %")
    figure.suptitle(f"Mean and range over the seeds; grey: {BASE}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
