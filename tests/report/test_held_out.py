"""Which held-out prompts are shown, and which of their responses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlsys.report import evaluations as module
from rlsys.report.evaluations import Evaluations, HeldOut, largest_rises, mean_scores, read_evaluations

MEANS = {
    # at steps      0    10   20   30
    "steady": (*(0.5, 0.5, 0.5, 0.5),),
    "learned": (*(0.0, 0.0, 1.0, 1.0),),
    "forgotten": (*(1.0, 1.0, 0.0, 0.0),),
    "up again": (*(0.75, 0.0, 0.25, 0.75),),
    "a little": (*(0.25, 0.5, 0.5, 0.5),),
    "back": (*(0.0, 1.0, 0.0, 0.0),),
}


@pytest.fixture
def run(answered: Callable, tmp_path: Path) -> Path:
    answered(tmp_path, {10 * i: {name: [means[i]] for name, means in MEANS.items()} for i in range(4)})
    return tmp_path


def of_kind(found: Evaluations, kind: str) -> list[HeldOut]:
    return [found.shown[place] for place in found.kinds[kind]]


def names(found: Evaluations, kind: str) -> list[str]:
    return [prompt.prompt_id for prompt in of_kind(found, kind)]


def test_what_changed_most_comes_first(run: Path) -> None:
    """Of what changed alike, what stayed changed comes first; in both directions, by any two evaluations."""
    found = read_evaluations(run, [])
    assert (found.read, found.files) == (4, 4)
    assert names(found, "learned") == ["learned", "back", "up again", "a little"]
    assert names(found, "forgotten") == ["forgotten", "back", "up again"]
    changed = names(found, "changed")
    assert sorted(changed[:2]) == ["forgotten", "learned"]
    assert changed[2:] == ["back", "up again", "a little"]
    assert sorted(names(found, "held_out")) == sorted(MEANS)
    assert len(found.shown) == len(MEANS), "each is there once"
    by_name = {prompt.prompt_id: prompt for prompt in found.shown}
    assert by_name["learned"].rise == (0, 20, 1.0)
    assert by_name["learned"].fall is None
    assert by_name["forgotten"].fall == (0, 20, -1.0)
    assert (by_name["back"].rise, by_name["back"].fall) == ((0, 10, 1.0), (10, 20, -1.0))
    assert (by_name["up again"].rise, by_name["up again"].fall) == ((10, 30, 0.75), (0, 10, -0.75))
    assert (by_name["steady"].rise, by_name["steady"].fall) == (None, None)


def test_a_prompt_has_its_responses_at_each_evaluation(answered: Callable, tmp_path: Path) -> None:
    answered(tmp_path, {0: {"a": [0.0, 1.0, None]}, 5: {"a": [None, None, None], "b": [1.0]}, 9: {"b": [1.0]}})
    found = read_evaluations(tmp_path, [])
    assert [len(found.kinds[kind]) for kind in ("changed", "learned", "forgotten", "held_out")] == [0, 0, 0, 2]
    a, b = sorted(of_kind(found, "held_out"), key=lambda prompt: prompt.prompt_id)
    assert (a.prompt, a.answer) == ("a?", "42")
    assert [(one.step, one.score, one.count) for one in a.evaluations] == [(0, 0.5, 3), (5, None, 3)]
    assert [(one.step, one.score, one.count) for one in b.evaluations] == [(5, 1.0, 1), (9, 1.0, 1)]
    assert [one.text for one in a.evaluations[0].responses] == ["a at 0, #0", "a at 0, #1", "a at 0, #2"]
    last = a.evaluations[0].responses[2]
    assert (last.score, last.status, last.detail) == (None, "timeout", "no answer")
    assert (last.tokens, last.versions, last.finish) == (7, "0[0:7]", "stop")


def test_of_many_evaluations_those_that_say_most_have_their_responses(answered: Callable, tmp_path: Path) -> None:
    """0.5 but for step 130, with the lowest score, and 170, with the highest."""
    means = {13: 0.0, 17: 1.0}
    answered(tmp_path, {10 * i: {"a": [means.get(i, 0.5)] * 9} for i in range(40)}, text="x" * 9_000)
    [prompt] = read_evaluations(tmp_path, []).shown
    assert prompt.rise == (130, 170, 1.0)
    assert prompt.fall == (0, 130, -0.5)
    assert [one.step for one in prompt.evaluations] == [10 * i for i in range(40)]
    assert {one.count for one in prompt.evaluations} == {9}
    shown = [one for one in prompt.evaluations if one.responses]
    assert len(shown) == module.MOST_EVALUATIONS
    assert {0, 130, 170, 390} < {one.step for one in shown}
    assert {len(one.responses) for one in shown} == {module.MOST_RESPONSES}
    texts = [found.text for one in shown for found in one.responses]
    assert all("characters left out" in text for text in texts)
    assert sum(map(len, texts)) < 1.1 * module.MOST_CHARACTERS


def test_no_more_prompts_than_a_page_can_hold(answered: Callable, tmp_path: Path) -> None:
    many = {f"p{i}": i / 1000 for i in range(200)}
    answered(tmp_path, {0: {name: [0.0] for name in many}, 1: {name: [rise] for name, rise in many.items()}})
    found = read_evaluations(tmp_path, [])
    assert names(found, "learned") == [f"p{i}" for i in range(199, 199 - module.MOST_PROMPTS, -1)]
    assert len(found.kinds["held_out"]) == module.MOST_PROMPTS
    assert names(read_evaluations(tmp_path, []), "held_out") == names(found, "held_out"), "always the same ones"


def test_a_run_without_evaluations_has_none(tmp_path: Path) -> None:
    problems: list[str] = []
    found = read_evaluations(tmp_path, problems)
    assert (list(found.shown), found.read, found.files, problems) == ([], 0, 0, [])
    assert {kind: len(places) for kind, places in found.kinds.items()} == dict.fromkeys(module.KINDS, 0)


def test_a_file_that_is_damaged_is_left_out(run: Path) -> None:
    damaged = run / "rollouts" / "evaluations" / "step-000020.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    problems: list[str] = []
    found = read_evaluations(run, problems)
    [problem] = problems
    assert str(damaged) in problem
    assert problem.endswith("the responses of that evaluation are left out")
    assert (found.read, found.files) == (3, 4)
    assert {one.step for prompt in found.shown for one in prompt.evaluations} == {0, 10, 30}
    assert names(found, "learned")[0] == "learned"


def test_unscored_responses_take_no_part_in_a_mean() -> None:
    def table(*rows: tuple[str, str, float]) -> pa.Table:
        ids, statuses, scores = zip(*rows, strict=True)
        return pa.table({"prompt_id": ids, "reward_status": statuses, "score": pa.array(scores, pa.float64())})

    nan = math.nan
    scores = mean_scores(
        [
            table(("a", "ok", 1.0), ("a", "ok", 0.0), ("a", "timeout", nan), ("b", "error", nan)),
            table(("c", "ok", 3.0), ("a", "ok", 2.0)),
        ]
    )
    assert list(scores.ids) == ["a", "b", "c"]
    np.testing.assert_array_equal(scores.counts_PE, [[3, 1], [1, 0], [0, 1]])
    np.testing.assert_array_equal(scores.means_PE, [[0.5, 2.0], [nan, nan], [nan, 3.0]])


@given(
    arrays(
        float,
        st.tuples(st.integers(0, 4), st.integers(0, 6)),
        elements=st.one_of(st.just(math.nan), st.integers(-3, 3).map(float)),
    )
)
def test_the_largest_rise_is_the_largest_of_all_pairs(means_PE: np.ndarray) -> None:
    rises = largest_rises(means_PE)
    for prompt, means in enumerate(means_PE):
        pairs = [
            (means[j] - means[i], i, j)
            for j in range(len(means))
            for i in range(j)
            if not math.isnan(means[i]) and not math.isnan(means[j])
        ]
        largest = max((by for by, _, _ in pairs), default=0.0)
        assert rises.by_P[prompt] == max(0.0, largest)
        if largest > 0:
            assert (largest, rises.before_P[prompt], rises.after_P[prompt]) in pairs
