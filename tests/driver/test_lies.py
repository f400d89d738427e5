"""Generators that lie, on simulated roles in virtual time: a refusal costs a try, or ends the run, as configured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.boundary import OnRefused, check_sampled
from rlsys.errors import ModelMismatchError, RolloutError
from rlsys.ledger.story import read_story
from rlsys.roles import Generated, Sampling
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.sim.roles import SimGenerator
from rlsys.types import Prompt


def lying(at: Sequence[str], on_refused: OnRefused = "retry") -> type[SimGenerator]:
    """Generators whose log-probs of some prompts are NaN, behind the check that real ones stand behind."""

    class Liar(SimGenerator):
        async def _sample(self, prompt: Prompt, sampling: Sampling) -> Generated:
            generated = await super()._sample(prompt, sampling)
            first, *rest = generated.payload.rollouts
            if prompt.id in at:
                first = replace(first, behavior_logprobs=first.behavior_logprobs * np.float32("nan"))
            group = replace(generated.payload, rollouts=(first, *rest))
            check_sampled(group, prompt, sampling, 256, on_refused)
            return generated

    return Liar


def make(kind: type[SimGenerator], *places: int) -> Any:
    def act(simulation: Simulation) -> None:
        for place in places:
            simulation.generators[place].__class__ = kind

    return act


def test_what_one_generator_lies_about_another_samples(tmp_path: Path) -> None:
    lies = [f"sim/{i}" for i in range(4)]
    simulation, summary = simulate(sim_config(steps=2), tmp_path, make(lying(lies), 0))
    assert summary["fates"] == {"trained": 8, "dropped": {}, "pending": 0}
    failed = [e.detail for name in lies for e in read_story(tmp_path, name).events if e.event == "failed"]
    assert failed
    for detail in failed:
        assert detail["worker"] == "generator-0"
        assert "generator-0: prompt sim/" in detail["cause"]
        assert "sample 0: the log-prob of response token 0 is nan" in detail["cause"]
    assert simulation.spawns == 0


def test_what_all_lie_about_is_dropped(tmp_path: Path) -> None:
    _, summary = simulate(sim_config(steps=2), tmp_path, make(lying(["sim/1"]), 0, 1))
    assert summary["fates"] == {"trained": 8, "dropped": {"generation failed": 1}, "pending": 0}
    story = read_story(tmp_path, "sim/1")
    assert story.prompt["attempts"] == 3
    assert "prompt sim/1, sample 0: the log-prob of response token 0 is nan" in story.prompt["reason"]


def test_with_stop_the_first_lie_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        RolloutError, match=r"on_refused is stop, .* generator-1: prompt sim/\d, sample 0: the log-prob"
    ):
        simulate(sim_config(), tmp_path, make(lying([f"sim/{i}" for i in range(9)], "stop"), 1))


def test_two_implementations_that_differ_end_the_run_without_a_restart(tmp_path: Path) -> None:
    class Different(SimGenerator):
        async def update(self, weights: Any) -> Any:
            raise ModelMismatchError(f"{self.name}: apart by 2.1e-2", kind="probe")

    made: list[Simulation] = []

    def act(simulation: Simulation) -> None:
        made.append(simulation)
        make(Different, 0, 1)(simulation)

    with pytest.raises(ModelMismatchError, match=r"^generator-0: apart by 2\.1e-2$"):
        simulate(sim_config(), tmp_path, act)
    assert made[0].spawns == 0
