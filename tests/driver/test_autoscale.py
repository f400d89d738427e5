"""The autoscaler: laws for any load, and runs of the real driver over roles that take time."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlsys.config.models import AutoscaleConfig, Config
from rlsys.config.sizes import SIZES
from rlsys.driver.autoscale import STAGE, Autoscaler, Role, Wish
from rlsys.errors import PlacementError
from rlsys.ledger.story import read_run
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.sim.roles import SimRewarder, Timing
from rlsys.types import RolloutGroup, ScoredGroup

ROLES: tuple[Role, ...] = ("generators", "reward_workers")


@dataclass
class Changes:
    """Sizes that do as the autoscaler wishes, and where it changed them."""

    scaler: Autoscaler
    sizes: dict[Role, int]
    at: list[int] = field(default_factory=list)
    steps: int = 0
    history: list[tuple[int, ...]] = field(default_factory=list)

    def step(self, shares: Mapping[str, float], settled: bool = True, room: bool = True, seconds: float = 1.0) -> None:
        self.steps += 1
        if wish := self.scaler.step(seconds, shares, self.sizes, settled):
            assert abs(wish.size - self.sizes[wish.role]) == 1
            if room:
                self.scaler.granted(wish, self.sizes[wish.role])
                self.sizes[wish.role] = wish.size
                self.at.append(self.steps)
            else:
                self.scaler.refused(wish.role)
        self.history.append(tuple(self.sizes.values()))


# ---- laws -----------------------------------------------------------------------------------------------------------

limits = st.tuples(st.integers(1, 6), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair)))


@st.composite
def configs(draw: st.DrawFn) -> AutoscaleConfig:
    low = draw(st.floats(0, 0.5))
    return AutoscaleConfig(
        generators=draw(limits),
        reward_workers=draw(limits),
        shrink_below=low,
        grow_above=draw(st.floats(low, 1, exclude_min=True)),
        window=draw(st.integers(1, 6)),
        cooldown=draw(st.integers(0, 6)),
        retry_after=draw(st.integers(1, 30)),
    )


@st.composite
def begun(draw: st.DrawFn) -> tuple[AutoscaleConfig, Changes]:
    config = draw(configs())
    sizes: dict[Role, int] = {role: draw(st.integers(*getattr(config, role))) for role in ROLES}
    return config, Changes(Autoscaler(config), sizes)


# shares of generation, reward and learner; whether all are there; whether there is room
some_steps = st.lists(
    st.tuples(st.tuples(*[st.floats(0, 1)] * 3), st.sampled_from([True] * 9 + [False]), st.booleans()), max_size=150
)


@given(begun(), some_steps)
def test_sizes_stay_within_their_limits_and_change_one_at_a_time_after_a_pause(
    start: tuple[AutoscaleConfig, Changes], steps: list[tuple[tuple[float, ...], bool, bool]]
) -> None:
    config, changes = start
    for shares, settled, room in steps:
        changes.step(dict(zip(("generation", "reward", "learner"), shares, strict=True)), settled, room)
        for role in ROLES:
            fewest, most = getattr(config, role)
            assert fewest <= changes.sizes[role] <= most
    for before, after in pairwise(changes.at):
        counted = sum(settled for _, settled, _ in steps[before:after])
        assert counted >= config.cooldown + config.window, "the cool-down, and then a whole window"


@dataclass(frozen=True)
class Load:
    """Seconds of a step with one worker each. Stages overlap (the run waits for the slowest), or take turns."""

    generation: float
    reward: float
    learner: float
    overlap: bool

    def shares(self, sizes: Mapping[Role, int]) -> dict[str, float]:
        spent = {stage: getattr(self, stage) / sizes[role] for role, stage in STAGE.items()}
        if not self.overlap:
            total = sum(spent.values()) + self.learner
            return {stage: seconds / total for stage, seconds in {**spent, "learner": self.learner}.items()}
        slowest = max(spent, key=lambda stage: spent[stage])
        total = max(self.learner, spent[slowest])
        return {stage: (total - self.learner) / total if stage == slowest else 0.0 for stage in spent} | {
            "learner": self.learner / total
        }


seconds = st.floats(0.01, 20)
loads = st.builds(Load, seconds, seconds, seconds, st.booleans())
STEPS = 1500


@settings(max_examples=50, deadline=None)
@given(begun(), loads)
def test_under_a_constant_load_it_settles(start: tuple[AutoscaleConfig, Changes], load: Load) -> None:
    """Where one worker is too few and two are too many, it may try the one again, ever more rarely."""
    config, changes = start
    for _ in range(STEPS):
        changes.step(load.shares(changes.sizes))
    most_tries = math.log2(STEPS / config.retry_after + 1) + 1  # waits of r, 2r, 4r, ... fit into the steps
    moves = sum(most - fewest for fewest, most in (config.generators or (1, 1), config.reward_workers or (1, 1)))
    assert len(changes.at) <= 2 * moves * (most_tries + 1)
    late = changes.history[STEPS // 2 :]
    usual = max(set(late), key=late.count)
    assert late.count(usual) > 0.8 * len(late)


@given(st.floats(0.1, 20), st.floats(0.1, 20), limits, st.data())
def test_it_ends_with_as_many_as_are_needed(
    generation: float, learner: float, between: tuple[int, int], data: st.DataObject
) -> None:
    """n of them take 1 - n * learner / generation of the time: the fewest that bring it below grow_above."""
    config = AutoscaleConfig(generators=between, window=3, cooldown=2, retry_after=10**6)
    sizes: dict[Role, int] = {"generators": data.draw(st.integers(*between)), "reward_workers": 1}
    changes = Changes(Autoscaler(config), sizes)
    load = Load(generation, 1e-6, learner, overlap=True)
    for _ in range(200):
        changes.step(load.shares(sizes))
    exact = generation * (1 - config.grow_above) / learner
    assume(abs(exact - round(exact)) > 1e-6)
    needed = min(max(math.ceil(exact), between[0]), between[1])
    found = sizes["generators"]
    assert found >= needed
    assert found == needed or 1 - found * learner / generation >= config.shrink_below, "no more than that either"


def test_where_one_is_too_few_and_two_are_too_many_it_tries_ever_more_rarely() -> None:
    """One generator takes 1.7 times as long as the learner, two take 0.85 times as long."""
    changes = Changes(
        Autoscaler(AutoscaleConfig(generators=(1, 4), window=2, cooldown=1, retry_after=50)),
        {"generators": 1, "reward_workers": 1},
    )
    for _ in range(STEPS):
        changes.step(Load(1.7, 1e-6, 1.0, True).shares(changes.sizes))
    assert {size for size, _ in changes.history} == {1, 2}
    shrinks = [i for i, (a, b) in enumerate(pairwise(changes.history)) if b < a]
    assert all(later - earlier >= 50 * 2**i for i, (earlier, later) in enumerate(pairwise([0, *shrinks])))
    assert len(shrinks) >= 3, "a load that may have become lighter is looked at again"
    assert sum(size == 2 for size, _ in changes.history) > 0.95 * STEPS


def test_a_load_that_gets_lighter_is_followed_in_the_end() -> None:
    config = AutoscaleConfig(generators=(1, 4), window=2, cooldown=0, retry_after=10)
    changes = Changes(Autoscaler(config), {"generators": 1, "reward_workers": 1})
    for _ in range(50):
        changes.step(Load(4.0, 1e-6, 1.0, True).shares(changes.sizes))
    assert changes.sizes["generators"] == 3
    for _ in range(200):
        changes.step(Load(0.5, 1e-6, 1.0, True).shares(changes.sizes))
    assert changes.sizes["generators"] == 1


def test_one_odd_step_changes_nothing() -> None:
    scaler = Autoscaler(AutoscaleConfig(generators=(1, 4), window=5, cooldown=0))
    usual = {"generation": 0.2, "reward": 0.0, "learner": 0.8}
    odd = {"generation": 1.0, "reward": 0.0, "learner": 0.0}
    sizes: dict[Role, int] = {"generators": 2, "reward_workers": 1}
    steps = [(30.0, odd) if i % 4 == 0 else (1.0, usual) for i in range(40)]
    assert not any(scaler.step(seconds, shares, sizes, True) for seconds, shares in steps)


def test_steps_that_wait_and_steps_that_do_not_take_turns() -> None:
    """Of 3 s + 1 s, generation takes 1.5 s: 37.5%, though in every second step it takes nothing."""
    scaler = Autoscaler(AutoscaleConfig(generators=(1, 4), window=4, cooldown=0, grow_above=0.37))
    waits = (3.0, {"generation": 0.5, "reward": 0.0, "learner": 0.5})
    does_not = (1.0, {"generation": 0.0, "reward": 0.0, "learner": 1.0})
    sizes: dict[Role, int] = {"generators": 2, "reward_workers": 1}
    wishes = [scaler.step(*step, sizes, True) for step in (waits, does_not, waits, does_not)]
    assert wishes[:3] == [None, None, None]
    assert wishes[3] == Wish("generators", 3, "autoscale: generation took 38% of the time of the last 4 steps")


def test_a_slow_reference_is_no_reason_to_shrink() -> None:
    scaler = Autoscaler(AutoscaleConfig(generators=(1, 4), window=2))
    shares = {"generation": 0.0, "reward": 0.0, "learner": 0.1}
    assert not any(scaler.step(1.0, shares, {"generators": 4, "reward_workers": 1}, True) for _ in range(20))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "names no role"),
        ({"generators": [3, 2]}, r"generators: \[3, 2\] has the fewest last"),
        ({"generators": [0, 2]}, "greater than 0"),
        ({"generators": [1, 2], "grow_above": 0.2, "shrink_below": 0.2}, r"shrink_below \(0.2\) must be less"),
        ({"reward_workers": [1, 2], "grow_above": 1.2}, "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_meant(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AutoscaleConfig.model_validate(values)


# ---- runs -----------------------------------------------------------------------------------------------------------

# Responses of 4 s; a generator samples 2 prompts at once, so that n of them take 24 / n seconds for a batch of 12.
TIMING: dict[str, Any] = {
    **{"lengths": (16, 16), "tokens_per_s": 4.0, "score_s": 0.01},
    **{"publish_s": 0.01, "update_s": 0.01, "spawn_s": 50.0},
}


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes as long as it says, every time."""

    async def exactly(rng: random.Random, mean_s: float) -> None:
        await asyncio.sleep(mean_s)

    monkeypatch.setattr("rlsys.sim.roles.pause", exactly)


def autoscaled(start: int = 1, steps: int = 60, **autoscale: Any) -> Config:
    return sim_config(
        *(steps, 12, 1, start),
        rollout={"samples_per_prompt": 2, "engine": {"max_num_seqs": 2}},
        driver={"prompts_per_step": 12, "max_staleness": 1, "autoscale": {"window": 4, "cooldown": 2, **autoscale}},
        eval={"before": False, "after": False},
        checkpoint={"every": 0},
    )


def changes_of(run_dir: Path) -> list[str]:
    return [change for note in read_run(run_dir).notes if note.event == "scaled" for change in note.detail["changes"]]


def sizes_over_steps(simulation: Simulation, name: str) -> list[float]:
    return [metrics[f"scale/{name}"] for _, metrics in simulation.tracker.steps]


@pytest.mark.parametrize(
    ("step_s", "most", "expected"),
    [
        (6.0, 8, 3),  # 3 take 8 s: a quarter of the time is waited for them
        (0.5, 3, 3),  # at the limit
        (20.0, 8, 1),
    ],
)
def test_a_run_that_waits_for_generation_grows_to_what_it_needs(
    steady: None, tmp_path: Path, step_s: float, most: int, expected: int
) -> None:
    config = autoscaled(generators=[1, most])
    simulation, summary = simulate(config, tmp_path, timing=Timing(**TIMING, step_s=step_s))
    over = sizes_over_steps(simulation, "generators")
    assert over[-1] == expected
    assert over == sorted(over), "it does not go back and forth"
    assert set(over) == set(range(1, expected + 1)), "one at a time"
    assert changes_of(tmp_path) == [f"rollout.generators: {n} -> {n + 1}" for n in range(1, expected)]
    assert summary["fates"] == {"trained": 720, "dropped": {}, "pending": 0}
    if expected > 1:
        assert json.loads((tmp_path / SIZES).read_text())["sizes"]["rollout.generators"] == expected


def test_a_run_that_waits_for_its_learner_shrinks(steady: None, tmp_path: Path) -> None:
    config = autoscaled(4, generators=[2, 4])
    simulation, summary = simulate(config, tmp_path, timing=Timing(**TIMING, step_s=40.0))
    assert sizes_over_steps(simulation, "generators")[-1] == 2
    assert changes_of(tmp_path) == ["rollout.generators: 4 -> 3", "rollout.generators: 3 -> 2"]
    assert summary["fates"]["trained"] == 720
    assert sorted(summary["versions"]["generators"]) == ["generator-0", "generator-1"]


def test_reward_workers_grow_by_themselves(steady: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scores one group after the other, 1 s each: m of them take 12 / m seconds for a batch."""
    locks: dict[SimRewarder, asyncio.Lock] = {}
    together = SimRewarder._score

    async def one_by_one(self: SimRewarder, group: RolloutGroup) -> ScoredGroup:
        async with locks.setdefault(self, asyncio.Lock()):
            return await together(self, group)

    monkeypatch.setattr(SimRewarder, "_score", one_by_one)
    config = autoscaled(6, reward_workers=[1, 6])
    timing = Timing(**{**TIMING, "tokens_per_s": 1000.0, "score_s": 1.0, "step_s": 3.0})
    simulation, _ = simulate(config, tmp_path, timing=timing)
    over = sizes_over_steps(simulation, "reward_workers")
    assert over[-1] == 3  # which take 4 s, of which a quarter is waited for them
    assert over == sorted(over)
    assert set(sizes_over_steps(simulation, "generators")) == {6}


def test_without_room_it_warns_and_waits_before_it_asks_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(config: Config) -> None:
        asked.append(simulations[0].driver.step)
        raise PlacementError("the cluster has no room for that")

    def act(simulation: Simulation) -> None:
        simulations.append(simulation)
        simulation.room = full

    asked: list[int] = []
    simulations: list[Simulation] = []
    config = autoscaled(generators=[1, 4], retry_after=20)
    simulation, summary = simulate(config, tmp_path, act, timing=Timing(**TIMING, step_s=1.0))
    assert summary["fates"]["trained"] == 720
    assert set(sizes_over_steps(simulation, "generators")) == {1}
    assert len(asked) == 3
    assert all(later - earlier >= 20 for earlier, later in pairwise(asked))
    warnings = [r.getMessage() for r in caplog.records if "no room" in r.getMessage()]
    assert len(warnings) == 3
    assert "2 generators (autoscale: generation took" in warnings[0]


def test_steps_of_very_different_lengths_do_not_make_it_go_back_and_forth(tmp_path: Path) -> None:
    """The learner's are exponential: most of a step's shares are noise."""
    config = autoscaled(2, steps=100, generators=[1, 6], window=10, cooldown=5)
    simulation, summary = simulate(config, tmp_path, timing=Timing(**TIMING, step_s=6.0))
    over = sizes_over_steps(simulation, "generators")
    assert all(1 <= size <= 6 for size in over)
    turns = [later - earlier for earlier, later in pairwise(over) if later != earlier]
    assert sum(a != b for a, b in pairwise(turns)) <= 2
    assert summary["fates"]["trained"] == 1200
