"""Every metric has one definition, and the pages that are made of them are up to date."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rlsys.algorithms import parts
from rlsys.curricula import Seen
from rlsys.curricula.in_order import InOrder
from rlsys.metrics.catalog import DEFINITIONS, PANELS, UNITS, Undefined, find, prometheus_name
from rlsys.metrics.pages import exported_name, grafana, markdown
from rlsys.sim.drive import sim_config, simulate

ROOT = Path(__file__).parents[2]
PLAIN = [d for d in DEFINITIONS if not d.is_pattern]


def test_definitions_are_whole() -> None:
    names = [d.name for d in DEFINITIONS]
    assert len(set(names)) == len(names)
    assert {d.panel for d in DEFINITIONS} == {panel.name for panel in PANELS}
    assert {d.unit for d in DEFINITIONS} <= set(UNITS)
    for d in DEFINITIONS:
        assert re.fullmatch(r"[a-z][a-z0-9_-]*/([a-z]+/)?[a-z0-9_]*(\{\w+\})?", d.name), d.name
        assert d.read.endswith("."), d.name
        assert d.read[0].isupper() or d.read[0].isdigit(), d.name


def test_a_name_is_found_by_itself_or_by_the_pattern_that_fits_best() -> None:
    assert all(find(d.name) is d for d in DEFINITIONS)
    assert find("restarts/generator") is find("restarts/{role}")
    assert find("dynamic/weight_math") is find("dynamic/weight_{name}")
    assert find("dynamic/weight") is not find("dynamic/weight_{name}")
    assert find("restarts/") is None
    assert find("reward/meen") is None


def test_what_parts_log_is_defined() -> None:
    """As their source names it; where a part of a name is known later only, something must fit the rest."""
    named = {name for kind in parts().values() for part in kind for name in part.metrics}
    assert len(named) > 90
    for name in named:
        head = name.partition("{")[0]
        assert find(name) or ("{" in name and any(d.name.startswith(head) for d in DEFINITIONS)), name


def test_a_metric_without_a_definition_is_named_once(undefined_metrics: None, caplog: pytest.LogCaptureFixture) -> None:
    undefined = Undefined()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            undefined.look({"reward/mean": 1.0, "mine/own": 2.0})
    assert [record.getMessage() for record in caplog.records] == [
        "metric mine/own is logged, but not defined in rlsys/metrics/catalog.py"
    ]


class Own(InOrder):
    """A part of a user's own."""

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        return {"mine/own": float(len(seen))}


def test_what_a_part_of_a_users_own_logs_needs_no_definition(
    undefined_metrics: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = sim_config(steps=2, batch=4, eval={"before": False, "after": False})
    simulation, _ = simulate(config, tmp_path, curriculum=Own())
    assert [metrics["mine/own"] for _, metrics in simulation.tracker.steps] == [4, 4]
    assert sum("mine/own" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reward/mean", "rlsys_reward_mean"),
        ("time/step_s", "rlsys_time_step_seconds"),
        ("tokens/trained_per_s", "rlsys_tokens_trained_per_second"),
        ("weights/bytes", "rlsys_weights_bytes"),
        ("rollout/truncated", "rlsys_rollout_truncated_ratio"),
        ("reg-grpo/error", "rlsys_reg_grpo_error"),
        ("refused/log-probs", "rlsys_refused_log_probs"),
        ("mine/own", "rlsys_mine_own"),
    ],
)
def test_names_in_prometheus(name: str, expected: str) -> None:
    assert prometheus_name(name) == expected


def test_names_in_prometheus_are_valid_and_different() -> None:
    names = [prometheus_name(d.name) for d in PLAIN]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)


def test_the_page_of_all_metrics_is_up_to_date() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert page == markdown(), "write it anew: rlsys metrics --markdown > docs/metrics.md"
    assert all(f"| `{d.name}` |" in page for d in DEFINITIONS)


def test_the_dashboard_is_up_to_date() -> None:
    path = ROOT / "launch" / "grafana-dashboard.json"
    assert path.read_text("utf-8") == grafana(), (
        "write it anew: rlsys metrics --grafana > launch/grafana-dashboard.json"
    )


def test_the_dashboard_asks_for_every_metric_by_its_exported_name() -> None:
    rows = json.loads(grafana())["panels"]
    graphs = [panel for row in rows for panel in (row, *row.get("panels", ())) if panel["type"] == "timeseries"]
    asked = {graph["title"]: graph["targets"][0]["expr"] for graph in graphs}
    assert asked.keys() == {d.name for d in DEFINITIONS}
    assert asked["time/step_s"] == 'ray_rlsys_time_step_seconds{run=~"$run"}'
    assert len({graph["id"] for graph in graphs}) == len(graphs)
    # a pattern asks for whatever a metric of it is called
    for d in DEFINITIONS:
        if d.is_pattern:
            actual = "ray_" + prometheus_name(re.sub(r"\{\w+\}", "math", d.name))
            assert re.fullmatch(exported_name(d), actual), d.name


def test_graphs_do_not_lie_on_each_other() -> None:
    rows = json.loads(grafana())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in (p for row in rows for p in (row, *row.get("panels", ()))):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
