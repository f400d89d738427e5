"""What is made of the definitions: docs/metrics.md, and the dashboard launch/grafana-dashboard.json."""

from __future__ import annotations

import json
import re
from typing import Any

from rlsys.metrics.catalog import DEFINITIONS, PANELS, UNITS, Definition, prometheus_name

EXPORTED_AS = "ray_"  # what Ray puts before the names of all metrics that it hands to Prometheus

_INTRODUCTION = """\
# Metrics

Written by `rlsys metrics --markdown` from the definitions in `rlsys/metrics/catalog.py`. `rlsys metrics NAME`
explains one.

Every learner step is a line of `RUN/metrics.jsonl`, and every evaluation a line of `RUN/evals.jsonl` (there without
the `eval/`). W&B, TensorBoard and Prometheus have the same names and values. A value that does not exist in a step is
left out of it, and never 0; a value that is not finite is left out, too. Means are over everything of the step at
once, never means of means.

In Prometheus `reward/mean` is `rlsys_reward_mean`, with the unit at the end where it is a share (`_ratio`), seconds
(`_seconds`) or bytes (`_bytes`), and the name of the run as the tag `run`; Ray, which exports them, puts `ray_`
before it all.

A metric of a part of your own needs no definition. It is logged as all others are, and the log says once that it has
none. To define it, add a line to the list; that also gives it a place here and on the dashboard."""

_BOUND = """\
**How a step's time is divided.** A step's time is from the record of the step before to its own (`time/step_s`). Of
it,

- the *learner* has what it spends on steps, on handing out weights and on copying its state for a checkpoint, while
  no batch is waited for;
- while a batch is waited for, the time belongs to what the group was doing that came last, the one that ended the
  wait: *generation* from its admission until its last token is there (waiting for a free generator included),
  *reward* from then until it is scored (waiting for a free reward worker included);
- if that group was admitted in the place of a dropped one, the time before belongs, in the same way, to what the
  dropped one was doing;
- the rest belongs to nobody: weights on their way, the reference's log-probs, writing to disk, an evaluation that is
  waited for.

So the three shares add up to at most 1, and the largest names the stage to make faster: more generators, more reward
workers or a faster function, more learner ranks. With a bound of 0 the stages take turns, and no share comes near 1."""

_ALERTS = """\
## Alerts

What looks bad is said in the log, noted in `RUN/ledger.sqlite`, marked in the timeline and sent as an alert of W&B; the
thresholds are in `trackers.alerts`, and null turns one off.

- A step, or updates of it, were not applied: something was not finite.
- The entropy, as a mean over the last `window` steps, is below a share (`entropy`) of what it was over the first ones.
- Held-out responses are `length_growth` times as long as at the best evaluation, and the accuracy is lower than it was
  then by more than `accuracy_drop`.
- A step takes `stall` times the median of those before, and over a minute.
- A part of the run died or hangs, and is restarted; or the run has failed.

The same thing is said again after `quiet_steps` steps at the earliest."""

_AFTER = {"utilisation": _BOUND}


def markdown() -> str:
    """docs/metrics.md."""
    lines = [_INTRODUCTION, "", "| unit | |", "| --- | --- |"]
    lines += [f"| {unit} | {meaning} |" for unit, meaning in UNITS.items()]
    for panel in PANELS:
        lines += ["", f"## {panel.title}", "", panel.about, ""]
        lines += ["| metric | unit | how to read it |", "| --- | --- | --- |"]
        lines += [f"| `{d.name}` | {d.unit} | {d.read.replace('|', chr(92) + '|')} |" for d in _of(panel.name)]
        if panel.name in _AFTER:
            lines += ["", _AFTER[panel.name]]
    return "\n".join([*lines, "", _ALERTS]) + "\n"


def exported_name(definition: Definition) -> str:
    """How Prometheus has it from Ray; with patterns a regular expression."""
    if not definition.is_pattern:
        return EXPORTED_AS + prometheus_name(definition.name)
    free = re.sub(r"\{\w+\}", "WILDCARD", definition.name)
    return EXPORTED_AS + prometheus_name(free).replace("WILDCARD", ".+")


_GRAFANA_UNITS = {"share": "percentunit", "s": "s", "bytes": "bytes"}
_WIDTH, _HEIGHT, _PER_ROW = 8, 7, 3
_NOT_SHOWN = ("algorithm", "curriculum")  # of which a run has few: folded


def grafana() -> str:
    """launch/grafana-dashboard.json: a row for each panel of the catalogue, a graph for each metric in it."""
    rows: list[dict[str, Any]] = []
    ids, y = iter(range(1, 10_000)), 0
    for panel in PANELS:
        folded = panel.name in _NOT_SHOWN
        row: dict[str, Any] = {
            "id": next(ids),
            "type": "row",
            "title": panel.title,
            "collapsed": folded,
            "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
            "panels": [],
        }
        y += 1
        graphs = [
            _graph(next(ids), d, (i % _PER_ROW) * _WIDTH, y + i // _PER_ROW * _HEIGHT)
            for i, d in enumerate(_of(panel.name))
        ]
        y += -(-len(graphs) // _PER_ROW) * _HEIGHT
        if folded:
            row["panels"] = graphs
            rows.append(row)
        else:
            rows += [row, *graphs]
    dashboard = {
        "uid": "rlsys",
        "title": "rlsys",
        "tags": ["rlsys", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": _SOURCE,
                    "query": f"label_values({EXPORTED_AS}{prometheus_name('time/step_s')}, run)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
    }
    head = json.dumps(dashboard, indent=1).removesuffix("\n}")
    return head + ',\n "panels": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n ]\n}\n"  # a line each


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _graph(number: int, definition: Definition, x: int, y: int) -> dict[str, Any]:
    name = exported_name(definition)
    if definition.is_pattern:
        expression, legend = f'{{__name__=~"{name}", run=~"$run"}}', "{{run}} {{__name__}}"
    else:
        expression, legend = f'{name}{{run=~"$run"}}', "{{run}}"
    return {
        "id": number,
        "type": "timeseries",
        "title": definition.name,
        "description": definition.read,
        "datasource": _SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": _GRAFANA_UNITS.get(definition.unit, "short")}, "overrides": []},
        "targets": [{"refId": "A", "datasource": _SOURCE, "expr": expression, "legendFormat": legend}],
    }


def _of(panel: str) -> list[Definition]:
    return [d for d in DEFINITIONS if d.panel == panel]
