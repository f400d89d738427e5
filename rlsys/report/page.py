"""The page: one file that needs no other, and no network.

All text of a run is escaped: jinja2 does it in the HTML; responses come as JSON and are put in as text by the script.
Besides, a content security policy lets nothing run but the two scripts of the page, named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rlsys.report import evaluations, samples
from rlsys.report.browser import buttons, plain_held_out, plain_sample, together
from rlsys.report.figures import Section, colour, every_metric, sections, template
from rlsys.report.groups import Group, differences, group_runs, show
from rlsys.report.reading import Run, number

_PAGE = Path(__file__).parent / "page"
_NOTES = 30  # incidents that are shown of a run


def render(runs: Sequence[Run]) -> str:
    """HTML of a report of these runs."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    groups = group_runs(runs)
    parts = sections(groups)
    metrics = every_metric(groups)
    scripts = [Markup(get_plotlyjs()), Markup((_PAGE / "page.js").read_text("utf-8"))]
    shown = [(place, run) for place, group in enumerate(groups) for run in group.runs]
    ordered = [run for _, run in shown]
    return environment.get_template("page.html").render(
        title=", ".join(group.label for group in groups),
        made=time.strftime("%Y-%m-%d %H:%M"),
        style=Markup((_PAGE / "page.css").read_text("utf-8")),
        scripts=scripts,
        hashes=" ".join(map(_hash, scripts)),
        problems=[(run.label, problem) for run in ordered for problem in run.problems],
        groups=[
            {"label": group.label, "colour": colour(place), "runs": len(group.runs), "seeds": _seeds(group)}
            for place, group in enumerate(groups)
        ],
        runs=[_facts(run, place) for place, run in shown],
        sections=parts,
        metrics=sorted(metrics),
        differences=differences(groups),
        configs=[
            (group.label, [(key, show(group.runs[0].config, key)) for key in sorted(group.runs[0].config)])
            for group in groups
        ],
        fates=_fates(ordered),
        incidents=[(run.label, len(run.incidents), _notes(run)) for run in ordered if run.incidents],
        kinds=buttons(samples.KINDS, [run.samples for run in ordered]),
        held_out=buttons(evaluations.KINDS, [run.evaluations for run in ordered]),
        most_evaluations=evaluations.MOST_EVALUATIONS,
        sampled=[(run.label, run.samples, run.evaluations) for run in ordered],
        segments=any(sample.pieces for run in ordered for sample in run.samples.shown),
        data={
            "template": template(),
            "figures": _figures(parts),
            "metrics": metrics,
            "runs": [run.label for run in ordered],
            "responses": together([run.samples for run in ordered], plain_sample),
            "held_out": together([run.evaluations for run in ordered], plain_held_out),
        },
    )


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _figures(parts: Sequence[Section]) -> list[Mapping[str, Any]]:
    """In the order in which the page has a place for each."""
    return [panel.figure for section in parts for panel in section.panels]


def _seeds(group: Group) -> str:
    return "; ".join(f"{key} {', '.join(map(str, values))}" for key, values in group.seeds.items())


def _facts(run: Run, place: int) -> dict[str, Any]:
    """The row of a run in the first table; "" for what is not known."""
    accuracy = [found for row in run.evals if (found := number(row.get("accuracy"))) is not None]
    reward = [found for row in run.steps if (found := number(row.get("reward/mean"))) is not None]
    tenth = max(1, len(reward) // 10)
    staleness = [found for row in run.steps if (found := number(row.get("staleness/max"))) is not None]
    tokens = [found for row in run.steps if (found := number(row.get("tokens/trained"))) is not None]
    return {
        "label": run.label,
        "colour": colour(place),
        "facts": {
            "state": run.state,
            "held-out accuracy": " → ".join(f"{value:.1%}" for value in [*accuracy[:1], *accuracy[1:][-1:]]),
            "reward": f"{_mean(reward[:tenth]):.3g} → {_mean(reward[-tenth:]):.3g}" if reward else "",
            "tokens trained": f"{sum(tokens):,.0f}" if tokens else "",
            "time": "" if run.wall_s is None else _clock(run.wall_s),
            "largest staleness": f"{max(staleness):g}" if staleness else "",
        },
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _fates(runs: Sequence[Run]) -> dict[str, Any]:
    """A table: a column for each reason of dropping, a row for each run whose fates are known."""
    known = [(run, run.fates) for run in runs if run.fates is not None]
    reasons = sorted({reason for _, fates in known for reason in fates["dropped"]})
    rows = []
    for run, fates in known:
        counts = [fates["trained"], *(fates["dropped"].get(reason, 0) for reason in reasons), fates["pending"]]
        drawn = sum(counts)
        shares = [f"{count / drawn:.1%}" if drawn else "" for count in counts]
        rows.append((run.label, f"{drawn:,}", [(f"{n:,}", part) for n, part in zip(counts, shares, strict=True)]))
    return {"columns": ["trained", *(f"dropped: {reason}" for reason in reasons), "pending"], "rows": rows}


def _notes(run: Run) -> list[tuple[str, str, str]]:
    """The newest incidents: when, what, and in a line what was said of it."""
    notes = []
    for note in run.incidents[-_NOTES:]:
        said = [
            f"{key} {value}"
            for key, value in note.detail.items()
            if isinstance(value, str | int | float) and value != ""
        ]
        line = ", ".join(said)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note.at))
        notes.append((at, note.event, line if len(line) <= 300 else f"{line[:300]} ..."))
    return notes[::-1]
