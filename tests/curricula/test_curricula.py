"""Each curriculum against its rule, computed another way."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys import curricula
from rlsys.curricula import Choice, Curriculum, Seen
from rlsys.curricula.category_bandit import CategoryBandit
from rlsys.curricula.entropy_target import EntropyTarget
from rlsys.curricula.in_order import InOrder
from rlsys.curricula.predicted_difficulty import PredictedDifficulty
from rlsys.curricula.staged import Staged
from rlsys.curricula.success_budget import SuccessBudget, allocate, value
from rlsys.curricula.uncertain_first import UncertainFirst
from rlsys.curricula.variance_promotion import VariancePromotion
from rlsys.errors import DataError
from rlsys.registry import discover
from rlsys.types import GroupInfo, Progress

PARTS = sorted(discover(curricula, Curriculum).items())


@dataclass
class Rows:
    """Row r has `r mod 4` under every key; finite ones go round in order, backwards in odd epochs."""

    size: int | None = None

    def at(self, place: int) -> tuple[int, str]:
        if self.size is None:
            return place, "0"
        epoch, place = divmod(place, self.size)
        return (self.size - 1 - place if epoch % 2 else place), str(epoch)

    def attribute(self, row: int, key: str) -> Any:
        if key == "missing":
            raise DataError("no 'missing'")
        return row % 4


def bound(part: Curriculum, size: int | None = 20, seed: int = 0, samples: int = 8) -> Curriculum:
    part.bind(Rows(size), seed, samples)
    return part


def seen(
    choice: Choice, index: int, *scores: float, advantage: float | None = None, value: float | None = None
) -> Seen:
    info = GroupInfo(
        f"r/{choice.row}@{choice.epoch}", index, "g", (3,) * len(scores), 0, 0, scores=scores, distinct_3=0.5
    )
    return Seen(choice, info, advantage, value)


def teach(part: Curriculum, steps: int = 4, batch: int = 5) -> None:
    """Some steps with scores that depend on the row."""
    for step in range(steps):
        indices = range(step * batch, (step + 1) * batch)
        choices = part.choose(indices, Progress(step, steps))
        found = [
            seen(c, i, *(float((c.row + k) % 3 == 0) for k in range(4)), advantage=c.row / 10)
            for c, i in zip(choices, indices, strict=True)
        ]
        part.observe(found, {"learner/entropy_estimate": 0.7 - 0.2 * step})


@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize(("name", "cls"), PARTS)
def test_choices_depend_on_memory_and_index_alone(name: str, cls: type[Curriculum], size: int | None) -> None:
    part = bound(cls(), size)
    teach(part)
    memory = json.loads(json.dumps(part.state_dict()))
    other = bound(cls(), size)
    other.load_state_dict(memory)
    indices = range(20, 32)
    first = part.choose(indices, Progress(2, 4))
    assert len(first) == 12
    assert first == part.choose(indices, Progress(2, 4)), "choosing changes nothing"
    assert first == other.choose(indices, Progress(2, 4)), "the memory is all of it"
    later = part.choose(range(32, 44), Progress(2, 4))
    assert len({(c.row, c.epoch) for c in first + later}) == 24, "no draw has the id of another"
    assert all(size is None or 0 <= c.row < size for c in first)
    if part.rng(1).random() != bound(cls(), size, seed=1).rng(1).random() and name in ("category-bandit",):
        assert first != [*_with(bound(cls(), size, seed=1), memory).choose(indices, Progress(2, 4))]
    assert part.observe([], {}) is not None, "a step may be skipped"


def _with(part: Curriculum, memory: dict[str, Any]) -> Curriculum:
    part.load_state_dict(memory)
    return part


def test_in_order() -> None:
    choices = bound(InOrder(), size=3).choose(range(5), Progress(0, 1))
    assert [(c.row, c.epoch) for c in choices] == [(0, "0"), (1, "0"), (2, "0"), (2, "1"), (1, "1")]


# ---- Knapsack RL ----


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(2, 5),
)
def test_the_allocation_is_the_best_there_is(rates: list[float], lowest: int, width: int, average: int) -> None:
    highest = lowest + width
    total = average * len(rates)
    found = allocate(rates, total, lowest, highest)
    allowed = [
        counts
        for counts in itertools.product(range(lowest, highest + 1), repeat=len(rates))
        if sum(counts) == min(max(total, lowest * len(rates)), highest * len(rates))
    ]
    assert tuple(found) in allowed
    best = max(sum(value(n, p) for n, p in zip(counts, rates, strict=True)) for counts in allowed)
    assert sum(value(n, p) for n, p in zip(found, rates, strict=True)) == pytest.approx(best, abs=1e-12)


def test_value_by_hand() -> None:
    assert value(2, 0.5) == pytest.approx((1 - 0.25 - 0.25) * 0.5 * 0.25)
    assert value(8, 0.0) == value(8, 1.0) == 0
    enumerated = sum(  # the chance that eight draws are not all alike
        0.25 ** sum(bits) * 0.75 ** (8 - sum(bits)) for bits in itertools.product((0, 1), repeat=8) if 0 < sum(bits) < 8
    )
    assert value(8, 0.25) == pytest.approx(enumerated * 0.25 * 0.75**2)


def test_samples_go_to_uncertain_prompts() -> None:
    part = bound(SuccessBudget(), size=4)
    first = part.choose(range(4), Progress(0, 2))
    assert [c.samples for c in first] == [None] * 4, "nothing is known yet"
    scores = {0: (1.0,) * 4, 1: (0.0,) * 4, 2: (1.0, 0.0, 0.0, math.nan), 3: (1.0, 1.0, 1.0, 0.0)}
    metrics = part.observe([seen(c, i, *scores[c.row]) for i, c in enumerate(first)], {})
    assert metrics["curriculum/in_between"] == 0.5
    again = {c.row: c.samples for c in part.choose(range(4, 8), Progress(1, 2))}
    assert again[0] == 2, "solved"
    assert again[1] is None, "never solved: the average"
    best = max(range(2, 21), key=lambda n: value(n, 1 / 3) + value(22 - n, 3 / 4))
    assert (again[2], again[3]) == (best, 3 * 8 - 2 - best)


# ---- SEC ----


def test_bandit_by_hand() -> None:
    part = bound(CategoryBandit(key="kind", temperature=0.5, rate=0.25))
    np.testing.assert_allclose(part.chances(), 0.25)
    part.observe([seen(Choice(1, "a"), 0, 1.0, advantage=0.8), seen(Choice(5, "b"), 1, 0.0)], {})  # one was dropped
    part.observe([seen(Choice(2, "c"), 2, 1.0, advantage=1.2), seen(Choice(9, "d"), 3, 1.0, advantage=0.4)], {})
    q = [0.0, 0.25 * 0.4 + 0.75 * (0.25 * 0.4), 0.25 * 1.2, 0.0]
    assert [part.values[str(k)] for k in range(4)] == pytest.approx(q)
    weights = [math.exp(v / 0.5) for v in q]
    np.testing.assert_allclose(part.chances(), [w / sum(weights) for w in weights])


@pytest.mark.parametrize("size", [None, 20])
def test_bandit_draws_as_often_as_it_says(size: int | None) -> None:
    part = bound(CategoryBandit(key="kind"), size)
    part.load_state_dict({"values": {"0": 2.0, "1": 0.0, "2": 0.0, "3": 1.0}})
    rows = [c.row for c in part.choose(range(2000), Progress(0, 1))]
    counts = np.bincount([row % 4 for row in rows]) / 2000
    np.testing.assert_allclose(counts, part.chances(), atol=0.04)
    if size is not None:
        assert {row for row in rows if row % 4 == 0} == {0, 4, 8, 12, 16}, "every row of a category"


# ---- VAS ----


def test_promotion_by_hand() -> None:
    part = bound(VariancePromotion(outcome=2.0, diversity=0.5, refresh=2, mixture=1.0))
    assert [c.row for c in part.choose(range(3), Progress(0, 1))] == [0, 1, 2], "nobody to promote yet"
    part.observe([seen(Choice(3, "0"), 0, 1.0, 0.0, 0.0, 0.0)], {})
    assert part.used == {}, "not refreshed yet"
    part.observe([seen(Choice(7, "0"), 1, 1.0, 1.0), seen(Choice(8, "0"), 2, math.nan)], {})
    assert part.used == {"3": pytest.approx(2 * 0.25 * 0.75 + 0.25), "7": pytest.approx(0.25)}
    rows = [c.row for c in part.choose(range(1000), Progress(0, 1))]
    assert rows.count(3) / 1000 == pytest.approx(0.625 / 0.875, abs=0.05)
    assert set(rows) == {3, 7}


# ---- SPO ----


def test_uncertain_prompts_are_drawn_more_often() -> None:
    """One draw of two candidates: the chances are those of the weights."""
    part = bound(UncertainFirst(pool=2, eps=0.1), size=2)
    part.load_state_dict({"values": {"0": 0.5, "1": 1.0}})
    rows = [part.choose([index], Progress(0, 1))[0].row for index in range(3000)]
    assert rows.count(0) / 3000 == pytest.approx(0.6 / 0.7, abs=0.03)


def test_no_candidate_is_drawn_twice_in_a_batch() -> None:
    part = bound(UncertainFirst(pool=3), size=100)
    choices = part.choose(range(10, 20), Progress(0, 1))
    assert len({c.row for c in choices}) == 10
    assert {c.row for c in choices} <= set(range(30, 60))
    few = bound(UncertainFirst(pool=3), size=4).choose(range(6), Progress(0, 1))
    assert {c.row for c in few} == {0, 1, 2, 3}, "a source smaller than the batch: rows come again"


def test_the_estimators_value_goes_before_the_mean() -> None:
    part = bound(UncertainFirst())
    part.observe([seen(Choice(1, "a"), 0, 1.0, 0.0, value=0.9), seen(Choice(2, "a"), 1, 1.0, 0.0)], {})
    assert part.values == {"1": 0.9, "2": 0.5}


# ---- PCL ----


def test_prompts_nearest_to_the_target_are_drawn() -> None:
    part = bound(PredictedDifficulty(pool=3, target=0.5))
    candidates = part.candidates(range(2, 4))
    assert candidates == [6, 7, 8, 9, 10, 11]
    part.judged(dict(zip(candidates, [0.9, 0.45, 0.5, 0.1, 0.58, 0.61], strict=True)))
    assert [c.row for c in part.choose(range(2, 4), Progress(0, 1))] == [7, 8]
    assert [c.row for c in part.choose(range(4, 6), Progress(0, 1))] == [12, 13], "not judged: in order"
    found = part.observe([seen(Choice(8, "d3"), 3, 1.0, 1.0), seen(Choice(12, "d4"), 4, 1.0)], {})
    assert found == {"curriculum/predicted": 0.5, "curriculum/prediction_error": 0.5}
    part.judged({1: 0.5})
    assert part.predicted == {1: 0.5}, "what was judged before is forgotten"
    part.judged({8: -0.5})
    assert [c.row for c in part.choose([2], Progress(0, 1))] == [8], "before those that nobody judged"


# ---- stages ----


@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize("descending", [False, True])
def test_stages_go_up_in_difficulty(size: int | None, descending: bool) -> None:
    part = bound(Staged(stages=4, key="kind", descending=descending), size)
    order = [3, 2, 1, 0] if descending else [0, 1, 2, 3]
    for step, kind in zip((0, 4, 8, 11), order, strict=True):
        assert {c.row % 4 for c in part.choose(range(40, 60), Progress(step, 12))} == {kind}
    both = bound(Staged(stages=4, key="kind", cumulative=True), size)
    assert {c.row % 4 for c in both.choose(range(200), Progress(4, 12))} == {0, 1}


def test_a_stage_gives_every_row_once_a_round() -> None:
    part = bound(Staged(stages=2, key="kind"), 20)
    rows = [c.row for c in part.choose(range(20), Progress(0, 2))]
    assert sorted(rows[:10]) == sorted(rows[10:]) == [r for r in range(20) if r % 4 < 2]


def test_what_cannot_be_staged() -> None:
    with pytest.raises(DataError, match="3 stages, but only 2 prompts"):
        bound(Staged(stages=3), 2)
    with pytest.raises(DataError, match="missing"):
        bound(Staged(key="missing"))
    with pytest.raises(ValueError, match="below lowest"):
        SuccessBudget(lowest=4, highest=3)


# ---- AEPO ----


def test_explored_groups() -> None:
    part = bound(EntropyTarget(target=0.5, ratio=3), size=None)
    choices = part.choose(range(8), Progress(0, 1))
    assert [c.row for c in choices] == [0, 1, 2, 0, 3, 4, 5, 3], "no prompt is left out"
    assert [c.temperature for c in choices] == [None, None, None, 0.8] * 2, "nothing measured yet"
    part.observe([], {"learner/entropy_estimate": 0.49})
    assert part.choose([3], Progress(0, 1))[0].temperature == 1.2
    part.observe([], {"learner/entropy_estimate": 0.5})
    assert part.choose([3], Progress(0, 1))[0].temperature == 0.8
