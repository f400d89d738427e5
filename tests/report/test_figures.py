"""Curves, bands and distributions, with numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from rlsys.report import figures
from rlsys.report.evaluations import Evaluations
from rlsys.report.figures import curve, every_metric, of, sections, share
from rlsys.report.groups import Group
from rlsys.report.reading import Run
from rlsys.report.samples import Samples


def rows(*values: float | None, name: str = "a") -> list[dict[str, Any]]:
    return [{"step": i, **({} if v is None else {name: v})} for i, v in enumerate(values, 1)]


def run(
    label: str, steps: list[dict[str, Any]], lengths: Mapping[int, Mapping[int, int]] = MappingProxyType({})
) -> Run:
    return Run(Path(label), label, {}, steps, [], None, None, lengths, Samples(), Evaluations(), None, [])


def test_a_band_reaches_from_the_lowest_to_the_highest_run() -> None:
    found = curve([rows(1, 2), rows(3, 8), rows(2, 5)], of("a"))
    assert found is not None
    assert found.steps == (1, 2)
    assert found.mean == (2, 5)
    assert (found.low, found.high) == ((1, 2), (3, 8))
    assert found.runs == (3, 3)


def test_steps_that_only_some_runs_have() -> None:
    """One run is shorter, another lacks a figure: the mean is that of the others."""
    found = curve([rows(1, 2, 3), rows(3)], of("a"))
    assert found is not None
    assert (found.mean, found.runs) == ((2, 2, 3), (2, 1, 1))
    found = curve([rows(1, None, 3), rows(3, 4, 5)], of("a"))
    assert found is not None
    assert (found.mean, found.low, found.high) == ((2, 4, 4), (1, 4, 3), (3, 4, 5))
    assert curve([rows(None, None)], of("a")) is None
    assert curve([], of("a")) is None


def test_what_is_no_number_is_no_point() -> None:
    odd = [{"step": 1, "a": "x"}, {"step": 2, "a": float("nan")}, {"step": 3, "a": True}, {"step": 4, "a": 2}]
    found = curve([odd], of("a"))
    assert found is not None
    assert (found.steps, found.mean) == ((4,), (2,))


def test_a_long_run_has_means_of_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MOST_POINTS", 2)
    found = curve([rows(1, 3, 5, 7), rows(3, 3, 1, 1)], of("a"))
    assert found is not None
    assert found.every == 2
    assert found.steps == (1.5, 3.5)
    assert (found.low, found.mean, found.high) == ((2, 1), (2.5, 3.5), (3, 6))


def test_a_part_of_a_whole_in_percent() -> None:
    value = share("wait", "step")
    assert value({"wait": 1.0, "step": 4.0}) == 25
    assert value({"wait": 1.0}) is None
    assert value({"wait": 0.0, "step": 0.0}) is None


def test_one_line_a_group_and_a_band_where_there_are_several_runs() -> None:
    groups = [
        Group("<b>two</b>", [run("0", rows(1, 2)), run("1", rows(3, 8))], {}),
        Group("one", [run("2", rows(7, 7))], {}),
    ]
    figure = every_metric(groups)["a"]
    band, line, single = figure["data"]
    assert band["fill"] == "toself"
    assert (band["x"], band["y"]) == ([1, 2, 2, 1], [3, 8, 2, 1])
    assert line["y"] == [2, 5]
    assert line["customdata"] == [[1, 3, 2], [2, 8, 2]]
    assert line["name"] == "&lt;b&gt;two&lt;/b&gt;", "plotly takes some HTML in texts"
    assert single["y"] == [7, 7]
    assert line["line"]["color"] != single["line"]["color"]


def test_panels_without_a_figure_are_left_out() -> None:
    groups = [Group("g", [run("0", rows(1, 2, name="staleness/mean"))], {})]
    [section] = sections(groups)
    assert (section.title, [panel.title for panel in section.panels]) == ("Staleness", ["Staleness"])
    evaluated = replace(groups[0].runs[0], evals=[{"step": 0, "accuracy": 0.5, "prompts": 1024}])
    [panel] = sections([Group("g", [evaluated], {})])[0].panels
    assert panel.what == "mean score of 1,024 problems"
    assert panel.figure["data"][0]["mode"] == "lines+markers"


def test_lengths_of_the_first_and_the_last_tenth_of_the_steps() -> None:
    lengths = {step: {10: 3, 12: 1} if step <= 2 else {11: 1} for step in range(1, 21)}
    [section] = sections([Group("g", [run("0", [], lengths)], {})])
    [panel] = section.panels
    first, last = panel.figure["data"]
    assert (first["x"], first["y"]) == ([10, 11, 12], [75, 0, 25])
    assert (last["x"], last["y"]) == ([11], [100])
    assert last["mode"] == "markers"


def test_long_responses_are_counted_in_bins() -> None:
    counts = dict.fromkeys(range(1, 601), 1)
    x, y = figures._shares(counts)
    assert len(x) == 60
    assert x[0] == 5.5  # of 1 to 10
    assert y == pytest.approx([100 / 60] * 60)
