"""What is reported, on series made by hand, and in a run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.models import AlertsConfig
from rlsys.driver.alerts import Alert, Alerts
from rlsys.errors import NonFiniteError
from rlsys.ledger.story import read_run
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.sim.roles import Timing

OFF = AlertsConfig(entropy=None, length_growth=None, stall=None)


def told(alerts: Alerts, series: Iterable[dict[str, float]], start: int = 1) -> list[tuple[int, str]]:
    """Steps and titles of what is reported of a series of steps."""
    return [(step, a.title) for step, metrics in enumerate(series, start) for a in alerts.step(step, metrics, None)]


# ---- skipped steps ------------------------------------------------------------------------------------------------


def test_a_skipped_step_is_reported_with_its_reason_and_not_again_at_once() -> None:
    alerts = Alerts(AlertsConfig(quiet_steps=10))
    assert alerts.step(1, {}, None) == []
    [alert] = alerts.step(2, {}, "a loss is not finite for 1 rollout: p#0")
    assert alert == Alert("a step was not applied", "step 2: a loss is not finite for 1 rollout: p#0")
    assert [bool(alerts.step(step, {}, "again")) for step in range(3, 14)] == [False] * 9 + [True, False]


def test_some_updates_of_a_step() -> None:
    [alert] = Alerts(OFF).step(7, {"learner/skipped_updates": 2.0}, None)
    assert alert.text.startswith("2 of the updates of step 7 were skipped")
    assert Alerts(OFF).step(7, {"learner/skipped_updates": 0.0}, None) == []


# ---- entropy ------------------------------------------------------------------------------------------------------


def entropies(*values: float, name: str = "learner/entropy") -> list[dict[str, float]]:
    return [{name: value} for value in values]


@pytest.mark.parametrize("name", ["learner/entropy", "learner/entropy_estimate"])
def test_entropy_below_a_share_of_what_it_was(name: str) -> None:
    """A window of 4 at 2 nats, then 0.1: the mean is 1.525, 1.05, 0.575, 0.1, the first below a fifth of 2."""
    alerts = Alerts(AlertsConfig(window=4, entropy=0.2))
    assert told(alerts, entropies(2, 2, 2, 2, 0.1, 0.1, 0.1, 0.1, 0.1, name=name)) == [(8, "the entropy has collapsed")]


def test_the_exact_entropy_is_taken_where_there_is_one() -> None:
    alerts = Alerts(AlertsConfig(window=1, entropy=0.5))
    series = [{"learner/entropy": 1.0, "learner/entropy_estimate": e} for e in (1.0, 0.1, 0.1)]
    assert told(alerts, series) == []


def test_a_steady_or_rising_entropy_is_none() -> None:
    assert told(Alerts(AlertsConfig(window=2)), entropies(*[1.0] * 20, *[3.0] * 20, *[0.4] * 20)) == []
    assert told(Alerts(OFF), entropies(*[1.0] * 20, *[0.0] * 40)) == []


# ---- length against accuracy ----------------------------------------------------------------------------------------


def evaluated(alerts: Alerts, *evaluations: tuple[float, float]) -> list[int]:
    """Places of the evaluations, of accuracy and length, that are reported."""
    return [i for i, (a, n) in enumerate(evaluations) if alerts.evaluated(10 * i, {"accuracy": a, "length_mean": n})]


def test_length_that_grows_while_the_accuracy_falls() -> None:
    alerts = Alerts(AlertsConfig(length_growth=1.5, accuracy_drop=0.05))
    assert evaluated(alerts, (0.3, 100), (0.5, 120), (0.46, 300), (0.44, 170), (0.44, 181)) == [4]


@pytest.mark.parametrize(
    "evaluations",
    [
        [(0.2, 100), (0.3, 200), (0.4, 400)],  # growing and better
        [(0.5, 100), (0.3, 100), (0.1, 60)],  # worse, and no longer
        [(0.5, 100), (0.46, 1000)],  # longer, and hardly worse
    ],
)
def test_neither_alone_is_reported(evaluations: list[tuple[float, float]]) -> None:
    assert evaluated(Alerts(AlertsConfig()), *evaluations) == []


def test_an_evaluation_without_a_score_says_nothing() -> None:
    assert Alerts(AlertsConfig()).evaluated(3, {"prompts": 4.0, "length_mean": 3.0}) == []


# ---- stalls -------------------------------------------------------------------------------------------------------


def test_a_step_that_takes_many_times_as_long() -> None:
    alerts = Alerts(AlertsConfig(stall=10.0))
    told(alerts, [{"time/step_s": s} for s in (30.0, 10.0, 10.0, 10.0, 12.0)])
    assert alerts.waiting(100.0) == []
    [alert] = alerts.waiting(101.0)
    assert alert.text == "no step for 101 s after step 5; usually one takes 10.0 s"
    assert alerts.waiting(200.0) == [], "once"


def test_quick_steps_may_be_a_minute_late() -> None:
    alerts = Alerts(AlertsConfig(stall=10.0))
    told(alerts, [{"time/step_s": 0.1}] * 5)
    assert alerts.waiting(60.0) == []
    assert alerts.waiting(61.0)


def test_nothing_is_late_while_nobody_knows_how_long_a_step_takes() -> None:
    alerts = Alerts(AlertsConfig())
    told(alerts, [{"time/step_s": 1.0}] * 4)
    assert alerts.waiting(1e6) == []


# ---- all ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.dictionaries(st.sampled_from(["learner/entropy", "time/step_s"]), st.floats(0, 10)), max_size=80),
    st.integers(1, 20),
)
def test_nothing_is_told_twice_within_the_quiet_steps(series: list[dict[str, float]], quiet: int) -> None:
    found = told(Alerts(AlertsConfig(window=3, quiet_steps=quiet)), series)
    steps = [step for step, title in found if title == "the entropy has collapsed"]
    assert all(b - a >= quiet for a, b in pairwise(steps))


def test_a_run_that_fails_says_of_what(tmp_path: Path) -> None:
    def act(simulation: Simulation) -> None:
        async def diverge(items: Any) -> Any:
            raise NonFiniteError("learner step 0: a loss is not finite")

        simulation.learner.step = diverge  # type: ignore[method-assign]
        made.append(simulation)

    made: list[Simulation] = []
    with pytest.raises(NonFiniteError):
        simulate(sim_config(eval={"before": False, "after": False}), tmp_path, act)
    why = "NonFiniteError: learner step 0: a loss is not finite"
    assert made[0].tracker.incidents == [("the run has failed", why)]
    assert [summary["failure"] for summary in made[0].tracker.summaries] == [why]


def test_a_run_reports_to_the_tracker_and_the_ledger(tmp_path: Path) -> None:
    """Step 3 is skipped; later the learner takes 4000 s for a step."""

    def act(simulation: Any) -> None:
        step = simulation.learner.step

        async def slow_at_8(items: Any) -> Any:
            if simulation.learner.version == 7:
                simulation.learner.slow_down(4000)
            return await step(items)

        simulation.learner.step = slow_at_8

    config = sim_config(
        steps=9,
        eval={"before": False, "after": False},
        learner={"step_timeout_s": 1e6},
        trackers={"alerts": {"quiet_steps": 1}},
        driver={"silence_timeout_s": 1e6, "prompts_per_step": 4, "max_staleness": 1},
    )
    simulation, _ = simulate(config, tmp_path, act, timing=Timing(step_s=1.0), skip=lambda step: step == 3)
    titles = [title for title, _ in simulation.tracker.incidents]
    assert titles[0] == "a step was not applied"
    assert "the run stalls" in titles
    assert "step 3: non-finite gradient" in simulation.tracker.incidents[0][1]
    assert [note.event for note in read_run(tmp_path).notes].count("alert") == len(titles)
