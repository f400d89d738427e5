"""A reference that follows the policy: when it moves, and that it survives a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.models import Config
from rlsys.sim.drive import Simulation, at, sim_config, simulate


def settings(steps: int = 6, bound: int = 0, **reference: Any) -> Config:
    return sim_config(
        steps=steps,
        bound=bound,
        batch=3,
        checkpoint={"every": 2},
        eval={"every": 3},
        reference={"update": "every", **reference},
    )


def versions(simulation: Simulation) -> list[int]:
    return simulation.reference.versions


@pytest.mark.parametrize(
    ("update", "every", "expected", "bound"), [("every", 2, [2, 4, 6], 0), ("moving_average", 1, [1, 2, 3], 2)]
)
def test_it_takes_the_versions_that_are_due(
    tmp_path: Path, update: str, every: int, expected: list[int], bound: int
) -> None:
    steps = expected[-1]
    simulation, _ = simulate(settings(steps, bound, update=update, every=every), tmp_path, with_reference=True)
    assert versions(simulation) == expected
    logged = [metrics["reference/version"] for _, metrics in simulation.tracker.steps]
    # A step is logged before its own version is published.
    assert logged == [max((v for v in expected if v < step), default=0) for step in range(1, steps + 1)]


def test_a_frozen_one_stays(tmp_path: Path) -> None:
    simulation, _ = simulate(settings(update="frozen"), tmp_path, with_reference=True)
    assert versions(simulation) == []
    assert not any("reference/version" in metrics for _, metrics in simulation.tracker.steps)
    assert not (tmp_path / "checkpoints" / "step-000006" / "reference").exists()


def test_with_a_bound_of_0_every_group_is_scored_by_the_reference_of_its_step(tmp_path: Path) -> None:
    """Whoever is fast or slow: the learner's state depends on every reference log-prob that it is given."""
    from rlsys.sim.roles import Timing

    states = set()
    for i, timing in enumerate([Timing(), Timing(update_s=9.0, reference_s=0.0), Timing(reference_s=5.0, step_s=0.1)]):
        simulation, _ = simulate(settings(), tmp_path / str(i), timing=timing, with_reference=True)
        states.add(simulation.learner.state)
    assert len(states) == 1
    frozen, _ = simulate(settings(update="frozen"), tmp_path / "frozen", with_reference=True)
    assert frozen.learner.state not in states


@pytest.mark.parametrize(("every", "stop_at"), [(1, 3.8), (1, 6.4), (3, 9.0)])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, every: int, stop_at: float) -> None:
    config = settings(every=every)
    whole, _ = simulate(config, tmp_path / "whole", with_reference=True)
    simulate(config, tmp_path / "parts", lambda s: at(stop_at, s.driver.stop), with_reference=True)
    second, _ = simulate(config, tmp_path / "parts", with_reference=True, seed=5)
    assert second.learner.state == whole.learner.state
    assert versions(second) == versions(whole)


def test_a_crash_takes_the_reference_back_to_the_checkpoint(tmp_path: Path) -> None:
    config = settings()

    def crash(simulation: Simulation) -> None:
        at(13.0, simulation.driver.stop)
        at(13.0, simulation.driver.stop)

    whole, _ = simulate(config, tmp_path / "whole", with_reference=True)
    with pytest.raises(asyncio.CancelledError):
        simulate(config, tmp_path / "parts", crash, with_reference=True)
    second, _ = simulate(config, tmp_path / "parts", with_reference=True, seed=5)
    assert second.learner.state == whole.learner.state
    assert versions(second) == versions(whole)
