"""The critic learns returns, the policy is held while asked to, and one is not updated when the other is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config.models import CriticConfig

pytestmark = pytest.mark.slow


def bits(world: Any) -> list[dict[str, np.ndarray]]:
    return [
        {f"{engine}/{name}": array for name, array in state.items()}
        for engine in ("policy", "critic")
        for state in world.run("state", engine=engine)
    ]


def changed(before: list[dict[str, np.ndarray]], after: list[dict[str, np.ndarray]]) -> set[str]:
    """Names of the engines with any difference."""
    return {
        name.split("/")[0]
        for one, other in zip(before, after, strict=True)
        for name in one
        if not np.array_equal(one[name], other[name])
    }


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_learns_the_returns_while_the_policy_is_held(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path, ranks: int, stage: int
) -> None:
    world = worlds[ranks]
    critic = CriticConfig(learning_rate=0.02, value_clip=None, hold_policy_steps=1)
    config = make_config(zero_stage=stage, micro_batch_tokens=80)
    world.run("build", config=config, model_path=tiny_model, critic=critic)
    batch = make_batch(rows=6, seed=5)
    # a return that can be told from the position: 1 early, -1 late
    columns = np.arange(batch.returns_BT.shape[1])[None]
    returns = np.where(batch.rollouts.mask_BT, np.where(columns < 5, 1.0, -1.0), 0.0).astype(np.float32)
    batch = dataclasses.replace(batch, returns_BT=returns)

    def error() -> float:
        for values in world.run("call", method="values", batch=batch.rollouts):
            errors = (values - returns)[batch.rollouts.mask_BT]
        return float(np.mean(errors**2))

    assert error() == pytest.approx(1.0), "values start at zero"
    before = bits(world)
    for _ in range(20):
        metrics, skipped = world.run("update", batch=batch)[0]
        assert skipped is None
    assert "learner/loss" not in metrics
    assert error() < 0.2
    assert changed(before, bits(world)) == {"critic"}
    world.run("advance")
    world.run("update", batch=batch)
    assert changed(before, bits(world)) == {"policy", "critic"}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_both_are_updated_or_neither(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path, ranks: int, stage: int
) -> None:
    world = worlds[ranks]
    config = make_config(zero_stage=stage, micro_batch_tokens=80, non_finite="skip", optimizer={"learning_rate": 0.01})
    world.run("build", config=config, model_path=tiny_model, critic=CriticConfig())
    good = make_batch(rows=6, seed=5)
    assert world.run("update", batch=good)[0][1] is None
    before = bits(world)
    for name in ("advantages_BT", "returns_BT"):  # one spoils the policy's loss, the other the critic's
        array = getattr(good, name).copy()
        array[3, 0] = np.nan
        for _, skipped in world.run("update", batch=dataclasses.replace(good, **{name: array})):
            assert "1 rollout: row/3@0#0" in skipped
        assert changed(before, bits(world)) == set()
    # the policy's gradient alone, without a loss that tells; DeepSpeed's own check comes first under ZeRO
    world.run("poison")
    assert "6 rollouts" in world.run("update", batch=good)[0][1]
    assert changed(before, bits(world)) == set()
    assert world.run("update", batch=good)[0][1] is None
    assert changed(before, bits(world)) == {"policy", "critic"}
