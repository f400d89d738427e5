"""Where the time of a step goes: by hand, by laws, and in runs in which one stage is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.filters.zero_variance import ZeroVariance
from rlsys.driver.bottleneck import STAGES, Passage, Span, Stage, shares
from rlsys.sim.drive import sim_config, simulate
from rlsys.sim.roles import Timing


def passage(generation: float, reward: float, after: float, ended: float, dropped: bool = False) -> Passage:
    return Passage((("generation", generation), ("reward", reward), ("after", after)), ended, dropped)


# ---- by hand ------------------------------------------------------------------------------------------------------


def test_a_wait_is_divided_as_the_last_group_spent_it() -> None:
    """Steps of 10 s: 2 busy, 6 waited (from 2 to 8), 2 busy."""
    last = passage(generation=1, reward=5, after=6, ended=8)
    earlier = passage(generation=0, reward=1, after=7, ended=7.5)
    found = shares((0, 10), [(2, 8)], [(0, 2), (8, 10)], [last, earlier])
    assert found == pytest.approx({"generation": 0.3, "reward": 0.1, "learner": 0.4})


def test_what_was_there_before_the_wait_had_no_part_in_it() -> None:
    early = passage(generation=0, reward=1, after=1.5, ended=2)
    assert shares((0, 10), [(2, 8)], [], [early]) == {"generation": 0, "reward": 0, "learner": 0}


def test_a_group_in_the_place_of_a_dropped_one() -> None:
    """The wait is from 0 to 10. A group scored from 4 to 6 is dropped at 6; the one in its place comes from 6 to 10."""
    dropped = passage(generation=0, reward=4, after=6, ended=6, dropped=True)
    other = passage(generation=0, reward=0.5, after=1, ended=5.9)  # finished, and no reason to wait
    last = passage(generation=6, reward=9, after=10, ended=10)
    found = shares((0, 10), [(0, 10)], [], [other, last, dropped])
    assert found == pytest.approx({"generation": 0.7, "reward": 0.3, "learner": 0})


def test_before_the_gate_opened_nobody_was_at_work() -> None:
    last = passage(generation=5, reward=9, after=10, ended=10)
    assert shares((0, 10), [(0, 10)], [], [last])["generation"] == pytest.approx(0.4)


def test_a_group_that_was_sampled_twice() -> None:
    twice = Passage((("generation", 0), ("reward", 2), ("generation", 3), ("reward", 9)), 10)
    assert shares((0, 10), [(0, 10)], [], [twice]) == pytest.approx({"generation": 0.8, "reward": 0.2, "learner": 0})


def test_the_learner_is_busy_only_while_nothing_is_waited_for() -> None:
    """Weights are handed out again from 1 to 4, while a batch is waited for from 2 on."""
    found = shares((0, 10), [(2, 5)], [(0, 1), (1, 4), (0.5, 1.5)], [passage(0, 5, 5, 5)])
    assert found == pytest.approx({"generation": 0.3, "reward": 0, "learner": 0.2})


def test_no_time_has_no_shares() -> None:
    assert shares((1, 1), [], [], []) == {}


# ---- laws ---------------------------------------------------------------------------------------------------------

times = st.floats(-50, 150, allow_nan=False)
stages: st.SearchStrategy[Stage] = st.sampled_from(["generation", "reward", "after"])


@st.composite
def passages(draw: st.DrawFn) -> Passage:
    moments = sorted(draw(st.lists(times, min_size=2, max_size=6)))
    return Passage(tuple((draw(stages), moment) for moment in moments[:-1]), moments[-1], draw(st.booleans()))


@st.composite
def waits(draw: st.DrawFn) -> list[Span]:
    """Without overlaps."""
    moments = sorted(draw(st.lists(times, max_size=8)))
    return list(zip(moments[::2], moments[1::2], strict=False))


spans = st.lists(st.tuples(times, times).map(lambda pair: (min(pair), max(pair))), max_size=5)


@given(waits(), spans, st.lists(passages(), max_size=12))
def test_shares_are_shares(waited: list[Span], busy: list[Span], groups: list[Passage]) -> None:
    found = shares((0, 100), waited, busy, groups)
    assert found.keys() == set(STAGES)
    assert all(0 <= share <= 1 for share in found.values())
    assert sum(found.values()) <= 1 + 1e-9


@given(waits(), spans, st.lists(passages(), max_size=6), st.floats(-1000, 1000), st.sampled_from([0.5, 2.0, 8.0]))
def test_only_proportions_count(
    waited: list[Span], busy: list[Span], groups: list[Passage], shift: float, scale: float
) -> None:
    def moved(span: Span) -> Span:
        return scale * span[0], scale * span[1]

    there = [Passage(tuple((s, scale * t) for s, t in p.stages), scale * p.ended, p.dropped) for p in groups]
    found = shares(moved((0, 100)), [*map(moved, waited)], [*map(moved, busy)], there)
    assert found == pytest.approx(shares((0, 100), waited, busy, groups), abs=1e-9)


@given(st.floats(0.01, 100), st.sampled_from(["generation", "reward"]))
def test_a_step_that_was_all_wait_for_one_stage(seconds: float, stage: Stage) -> None:
    found = shares((0, seconds), [(0, seconds)], [(0, seconds)], [Passage(((stage, -1.0),), seconds)])
    assert found[stage] == pytest.approx(1)
    assert sum(found.values()) == pytest.approx(1)


# ---- runs in which one stage is slow --------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    **{"lengths": (4, 8), "tokens_per_s": 1000.0, "score_s": 0.01},
    **{"reference_s": 0.0, "step_s": 0.01, "publish_s": 0.001, "update_s": 0.001},
}
SLOW: dict[str, dict[str, Any]] = {
    "generation": {"tokens_per_s": 0.5},
    "reward": {"score_s": 10.0},
    "learner": {"step_s": 10.0},
}


def bound(tmp_path: Path, slow: str, **options: Any) -> dict[str, float]:
    """Shares of the time of all steps but the first, in a run with that stage a thousand times slower."""
    timing = Timing(**{**QUICK, **SLOW[slow]})
    config = sim_config(
        steps=8,
        batch=4,
        bound=options.pop("bound", 1),
        eval={"before": False, "after": False},
        checkpoint={"every": 0},
        learner={"step_timeout_s": 5000.0},
    )
    simulation, _ = simulate(config, tmp_path, timing=timing, **options)
    steps = [metrics for _, metrics in simulation.tracker.steps[1:]]
    total = sum(m["time/step_s"] for m in steps)
    found = {stage: sum(m[f"bound/{stage}"] * m["time/step_s"] for m in steps) / total for stage in STAGES}
    assert all(sum(m[f"bound/{stage}"] for stage in STAGES) <= 1 + 1e-9 for m in steps)
    return found


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("slow", STAGES)
def test_the_slow_stage_is_named(tmp_path: Path, slow: str, staleness: int) -> None:
    found = bound(tmp_path, slow, bound=staleness)
    assert found[slow] > 0.95, found


@pytest.mark.parametrize("slow", ["generation", "reward"])
def test_also_where_groups_are_dropped_for_others(tmp_path: Path, slow: str) -> None:
    """With two rollouts scored 0 or 1, half of the groups have no variance."""
    found = bound(tmp_path, slow, filters=[ZeroVariance()])
    assert found[slow] > 0.9, found


def test_a_slow_reference_is_nobodys(tmp_path: Path) -> None:
    timing = Timing(**{**QUICK, "reference_s": 10.0})
    config = sim_config(steps=4, eval={"before": False, "after": False}, learner={"step_timeout_s": 5000.0})
    simulation, _ = simulate(config, tmp_path, timing=timing, with_reference=True)
    assert all(sum(m[f"bound/{stage}"] for stage in STAGES) < 0.1 for _, m in simulation.tracker.steps[1:])
