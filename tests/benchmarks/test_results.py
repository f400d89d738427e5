"""The arithmetic of paired timings, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import Ratio, Result, paired, write


def test_pairs_are_neighbours_and_the_first_does_not_count() -> None:
    order: list[str] = []
    bare, ours = iter([100.0, 1.0, 2.0, 9.0]), iter([1.0, 2.0, 2.0, 10.0])

    def take(name: str, times: object) -> float:
        order.append(name)
        return float(next(times))  # type: ignore[call-overload]

    ratio, bare_s, ours_s = paired(lambda: take("bare", bare), lambda: take("ours", ours), 3)
    assert order == ["bare", "ours"] * 4
    assert ratio == Ratio(0.9, 0.5, 1.0)
    assert (bare_s, ours_s) == (2.0, 2.0)


def test_results_are_written_without_names_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    write([Result("one", "The one", (("ratio", "0.90", "wanted"),), {"ratio": 0.9})])
    write([Result("two", "The other", (("ratio", "0.80", "wanted"),), {"ratio": 0.8})])
    content = json.loads((tmp_path / "one.json").read_text())
    assert content["figures"] == {"ratio": 0.9}
    assert set(content["machine"]) == {"cores", "packages"}
    table = (tmp_path / "README.md").read_text()
    assert table.index("## The one") < table.index("| ratio | 0.90 | wanted |") < table.index("## The other")
