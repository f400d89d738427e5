"""Learning-rate schedules (fast)."""

from __future__ import annotations

import pytest

from rlsys.config.models import OptimizerConfig
from rlsys.learner.optimizer import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": 2.0, **options})
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_constant_with_warm_up() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_linear_ends_at_the_final_fraction() -> None:
    assert rates(6, schedule="linear", warmup_steps=1, final_fraction=0.2) == pytest.approx(
        [2.0, 2.0, 1.6, 1.2, 0.8, 0.4]
    )


def test_cosine_is_half_way_down_in_the_middle() -> None:
    got = rates(5, schedule="cosine", final_fraction=0.5)
    assert got == pytest.approx([2.0, 1.8535533905932737, 1.5, 1.1464466094067263, 1.0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_short_runs_and_steps_beyond_the_end(schedule: str) -> None:
    assert rates(1, schedule=schedule, warmup_steps=3) == pytest.approx([2 / 3])
    config = OptimizerConfig.model_validate({"learning_rate": 2.0, "schedule": schedule, "final_fraction": 0.1})
    assert learning_rate(config, 50, 10) == pytest.approx(2.0 if schedule == "constant" else 0.2)
