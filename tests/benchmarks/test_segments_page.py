"""Reading accuracies off at equal tokens and at equal time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.segments import TASKS, Case, record
from benchmarks.segments_page import accuracy_at, shortest, write


def run(name: str, seed: int, tokens: int, last: float) -> dict[str, object]:
    """Two steps of `tokens` each, one second and then three, accuracy from 0.1 over 0.2 to `last`."""
    steps = [
        (i, {"tokens/generated": float(tokens), "tokens/trained": tokens / 2, "time/step_s": s})
        for i, s in ((1, 1.0), (2, 3.0))
    ]
    evals = [(0, {"accuracy": 0.1}), (1, {"accuracy": 0.2}), (2, {"accuracy": last})]
    return record(Case(name, name, 2, 1, 1), seed, steps, evals, None)


def test_between_evaluations_accuracy_is_on_the_line() -> None:
    found = run("grpo", 0, 100, 0.4)
    assert found["trained"] == 100
    assert [accuracy_at(found, "tokens", place) for place in (0, 50, 100, 150, 999)] == pytest.approx(
        [0.1, 0.15, 0.2, 0.3, 0.4]
    )
    assert [accuracy_at(found, "seconds", place) for place in (0.5, 1, 2.5, 4)] == pytest.approx([0.15, 0.2, 0.3, 0.4])


def test_all_are_compared_where_the_shortest_ends(tmp_path: Path) -> None:
    runs = [run("grpo", seed, 100, 0.2 + 0.01 * seed) for seed in (0, 1, 2)]
    runs += [run("spo-tree", seed, 200, 0.6 + 0.01 * seed) for seed in (0, 1, 2)]
    by_name = {"grpo": runs[:3], "spo-tree": runs[3:]}
    assert (shortest(by_name, "tokens"), shortest(by_name, "seconds")) == (200, 4)
    write(runs, TASKS, tmp_path / "segments.md")
    text = (tmp_path / "segments.md").read_text()
    # After 200 tokens a tree is at its first evaluation; after 4 seconds at its last.
    assert "| spo-tree | 3 | 10.0% | 20.0% ± 0.0 | 61.0% ± 1.0 † | 100 | 50% |" in text
    assert "at equal sampled tokens no difference is seen; at equal wall time `spo-tree` is better." in text


def test_two_runs_are_no_evidence_and_what_varies_one_method_is_not_timed(tmp_path: Path) -> None:
    runs = [run("spo-tree", seed, 100, 0.4) for seed in (0, 1)]
    runs += [run("16", seed, 100, 0.6) | {"group": "tree shape"} for seed in (0, 1)]
    write(runs, TASKS, tmp_path / "segments.md")
    _, shapes = (tmp_path / "segments.md").read_text().split("## Tree shape")
    assert "| 4-4 | 2 | 10.0% | 40.0% ± 0.0 | 50% |" in shapes
    assert "| 16 | 2 | 10.0% | 60.0% ± 0.0 | 50% |" in shapes
    assert "second" not in shapes
    assert "Beside" not in shapes
