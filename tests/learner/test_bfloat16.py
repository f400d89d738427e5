"""bfloat16 models keep float32 master weights under ZeRO 1 to 3, and are refused under ZeRO 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from rlsys.errors import ConfigError, NonFiniteError

pytestmark = pytest.mark.slow


def bf16(config: Any) -> Any:
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_small_updates_are_not_lost(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    world = worlds[2]
    config = bf16(make_config(zero_stage=stage, micro_batch_tokens=60, optimizer={"learning_rate": 1e-6}))
    world.run("build", config=config, model_path=tiny_model)
    before = world.run("state")[0]
    for seed in range(2):
        for metrics, skipped in world.run("update", batch=make_batch(rows=6, seed=seed)):
            assert skipped is None
            assert np.isfinite(metrics["learner/grad_norm"].value())
        world.run("advance")
    held = world.run("state")
    name = next(name for name in before if name.startswith("param/") and name.endswith("q_proj.weight"))
    # Adam moves every weight by about 1e-6 an update: far below what bfloat16 resolves
    moved = np.abs(held[0][name] - before[name])
    assert 0.5e-6 < np.median(moved) < 4e-6

    bad = make_batch(rows=6, seed=0)
    bad.advantages_BT[2, 0] = np.nan
    with pytest.raises(NonFiniteError, match="row/2@0#0"):
        world.run("update", batch=bad)
    for one, other in zip(world.run("state"), held, strict=True):
        assert not [key for key in one if not np.array_equal(one[key], other[key])]

    world.run("save", directory=tmp_path, tokenizer=tiny_model, memory={})
    world.run("build", config=config, model_path=tiny_model)
    world.run("load", directory=tmp_path)
    for one, other in zip(world.run("state"), held, strict=True):
        assert not [key for key in one if not np.array_equal(one[key], other[key])]
    published = world.run("weights")[0]
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert all(np.array_equal(file.get_tensor(key).float().numpy(), published[key]) for key in published)
    rounded = held[0][name]
    assert np.abs(published[name.removeprefix("param/")] - rounded).max() <= 2**-8 * np.abs(rounded).max()


def test_stage_0_is_refused(worlds: dict[int, Any], make_config: Any, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.zero_stage"):
        worlds[1].run("build", config=bf16(make_config(zero_stage=0)), model_path=tiny_model)
