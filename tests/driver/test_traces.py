"""A few prompts of each step can be followed, from their sampling to the gradient, by their id."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from rlsys.driver.traces import PROMPTS_PER_STEP
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.chain import Chain
from rlsys.sim.drive import sim_config, simulate

STAGES = ["sampling", "reward", "disk", "reference", "queue", "gradient"]


def ways(traced: list[tuple[str, float, float, str, str]]) -> dict[str, list[tuple[str, float, float, str]]]:
    out: dict[str, list[tuple[str, float, float, str]]] = {}
    for *stage, prompt in traced:
        out.setdefault(prompt, []).append(tuple(stage))  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize(("batch", "followed"), [(2, 2), (4, 4), (16, 4), (17, 5)])
def test_some_of_every_batch_pass_all_stages(tmp_path: Path, batch: int, followed: int) -> None:
    simulation, _ = simulate(sim_config(steps=3, batch=batch), tmp_path, with_reference=True)
    found = ways(simulation.tracker.traced)
    assert PROMPTS_PER_STEP == 4
    assert sum(int(prompt.removeprefix("sim/")) < batch for prompt in found) == followed
    assert len(found) >= 3 * min(batch, PROMPTS_PER_STEP)
    for stages in found.values():
        assert [name for name, *_ in stages] == STAGES
        assert all(before[2] == after[1] for before, after in itertools.pairwise(stages))
        assert stages[0][3].startswith("generator-")
        assert stages[1][3].startswith("rewarder-")
        assert stages[-1][3] == "learner"


def test_the_gradient_ends_with_the_step(tmp_path: Path) -> None:
    simulation, _ = simulate(sim_config(steps=2), tmp_path, with_reference=True)
    ends = {end for name, _, end, _, _ in simulation.tracker.traced if name == "gradient"}
    steps = {end for name, _, end, _ in simulation.tracker.events if name.startswith("step ")}
    assert ends == steps


def test_branches_are_a_stage_of_their_own(tmp_path: Path) -> None:
    strategy = Chain(continuations=2)
    strategy.bind(FixedLength(tokens=8), 40)
    config = sim_config(steps=1, rollout={"max_new_tokens": 40})
    simulation, _ = simulate(config, tmp_path, strategy=strategy)
    assert "branches" in {name for name, *_ in simulation.tracker.traced}


@pytest.mark.parametrize("options", [{"timeout_rate": 0.5}, {"failure_rate": 0.6}], ids=["rewards", "generators"])
def test_what_is_dropped_is_forgotten(tmp_path: Path, options: dict[str, Any]) -> None:
    config = sim_config(steps=3, samples=1, rollout={"attempts": 2}, driver={"restarts": 50})
    simulation, summary = simulate(config, tmp_path, **options)
    assert summary["fates"]["dropped"]
    assert simulation.driver.recorder.traces._since == {}
