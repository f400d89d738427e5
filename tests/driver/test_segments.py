"""Chains and trees through the whole driver, on simulated roles in virtual time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.ledger.store import RolloutStore
from rlsys.ledger.story import read_story
from rlsys.segments import Strategy
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.partitions.python import Python
from rlsys.segments.strategies.chain import Chain
from rlsys.segments.strategies.reset import Reset
from rlsys.segments.strategies.tree import Tree
from rlsys.segments.strategies.windows import Windows
from rlsys.sim.drive import SimPrompts, Simulation, at, sim_config, simulate
from rlsys.types import Demonstration, Prompt, ScoredGroup


def strategy(kind: str) -> Strategy:
    made: Strategy = Chain(continuations=3) if kind == "chain" else Tree(breadth=(2, 2, 2), segment_tokens=10)
    made.bind(FixedLength(tokens=8), 40)
    return made


class Keeping(RolloutStore):
    """Keeps every group in memory beside the file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.groups: dict[str, ScoredGroup] = {}

    async def buffered(self, group: Any) -> None:
        self.groups[group.prompt.id] = group
        await super().buffered(group)


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_every_token_knows_its_version_and_every_prompt_its_fate(tmp_path: Path, kind: str, bound: int) -> None:
    store = Keeping(tmp_path / "rollouts")
    config = sim_config(steps=5, batch=3, bound=bound, rollout={"max_new_tokens": 40})
    simulation, summary = simulate(config, tmp_path, strategy=strategy(kind), store=store)
    assert summary["fates"]["trained"] == 15
    assert summary["fates"]["dropped"] == {}
    assert summary["staleness"]["max"] <= bound
    for group in store.groups.values():
        for rollout in group.rollouts:
            assert (rollout.versions >= 0).all()
            ends = [0, *(span.end for span in rollout.version_spans)]
            assert [span.start for span in rollout.version_spans] == ends[:-1]
            assert ends[-1] == len(rollout.token_ids)
            assert rollout.segments[0].start == 0
            assert rollout.segments[-1].end == len(rollout.token_ids)
    if bound:
        versions = {len(np.unique(r.versions)) for group in store.groups.values() for r in group.rollouts}
        assert max(versions) > 1, "weights came while a response was under way"
    story = read_story(tmp_path, simulation.learner.batches[0].prompt_ids[0])
    assert any(event.event == "branched" for event in story.events)
    once = sum(sum(map(len, (r.token_ids for r in g.rollouts))) for g in store.groups.values())
    if kind == "chain":
        assert summary["tokens"]["generated"] > once, "continuations are counted"


def test_a_lost_generator_costs_time_alone(tmp_path: Path) -> None:
    config = sim_config(steps=4, batch=2, bound=1, generators=2, rollout={"max_new_tokens": 40})

    def act(simulation: Simulation) -> None:
        at(4.0, simulation.generators[0].kill)
        at(9.0, simulation.generators[1].kill)

    simulation, summary = simulate(config, tmp_path, act, strategy=strategy("chain"))
    assert simulation.spawns == 2
    assert summary["fates"]["trained"] == 8


def test_a_stopped_and_resumed_run_of_chains_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    config = sim_config(steps=4, batch=2, bound=0, rollout={"max_new_tokens": 40})
    whole, _ = simulate(config, tmp_path / "whole", strategy=strategy("chain"))
    simulate(config, tmp_path / "parts", lambda s: at(20.0, s.driver.stop), strategy=strategy("chain"))
    second, _ = simulate(config, tmp_path / "parts", strategy=strategy("chain"), seed=3)
    assert second.learner.state == whole.learner.state


@pytest.mark.parametrize("bound", [0, 2])
def test_unfinished_responses_go_on_in_later_steps(tmp_path: Path, bound: int) -> None:
    """Also over a crash: what a response began with is what it goes on from."""
    config = sim_config(steps=9, batch=3, bound=bound, rollout={"max_new_tokens": 40}, checkpoint={"every": 1})

    def parts(directory: Path) -> dict[str, Any]:
        made = Windows(tokens=12)
        made.bind(FixedLength(), 40)
        return {"strategy": made, "store": Keeping(directory / "rollouts"), "prompts": SimPrompts(size=50)}

    def act(simulation: Simulation) -> None:
        at(12.0, simulation.driver.stop)

    whole, summary = simulate(config, tmp_path / "whole", **parts(tmp_path / "whole"))
    assert summary["fates"]["trained"] == 27
    groups = whole.store.groups
    later = {i: g for i, g in groups.items() if g.prompt.prefix_tokens}
    assert later, "some are longer than a window"
    for prompt_id, group in later.items():
        before, _, sample = prompt_id.rpartition("/")
        rollout = groups[before].rollouts[int(sample)]
        begun = groups[before].prompt.prefix_tokens + len(rollout.token_ids)
        assert group.prompt.prefix_tokens == begun
        assert group.prompt.token_ids[-len(rollout.token_ids) :].tolist() == rollout.token_ids.tolist()
        assert len(group.rollouts) == 1
        assert begun + len(group.rollouts[0].token_ids) <= 40
    if bound == 0:
        simulate(config, tmp_path / "parts", act, **parts(tmp_path / "parts"))
        second, _ = simulate(config, tmp_path / "parts", **parts(tmp_path / "parts"))
        assert second.learner.state == whole.learner.state


def test_responses_that_begin_in_a_demonstration(tmp_path: Path) -> None:
    """Prompt and beginning go to the generator together, and what is sampled is so much shorter."""

    class Shown(SimPrompts):
        def draw(self, index: int, row: int | None = None, epoch: str = "") -> Prompt:
            shown = Demonstration("shown", np.arange(20, 40, dtype=np.int32))
            return replace(super().draw(index, row, epoch), demonstration=shown)

    made = Reset()
    made.bind(FixedLength(), 30)
    store = Keeping(tmp_path / "rollouts")
    config = sim_config(steps=4, batch=3, rollout={"max_new_tokens": 30})
    simulate(config, tmp_path, strategy=made, store=store, prompts=Shown(size=50))
    begun = [group.prompt.prefix_tokens for group in store.groups.values()]
    assert len(set(begun)) > 3
    for group in store.groups.values():
        prefix = group.prompt.prefix_tokens
        assert group.prompt.token_ids.tolist() == [1, 2, 3, *range(20, 20 + prefix)]
        assert max(len(r.token_ids) for r in group.rollouts) <= 30 - prefix


def test_a_rule_that_goes_wrong_costs_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(
        "def cut(pieces, probabilities):\n    return [0] if len(probabilities) % 3 else [5, 4]\n"
    )
    made = Chain(continuations=2)
    made.bind(Python(path=f"{tmp_path}/rule.py:cut"), 40)
    config = sim_config(steps=3, batch=2, rollout={"max_new_tokens": 40})
    _, summary = simulate(config, tmp_path, strategy=made)
    assert summary["fates"]["trained"] == 6
    assert set(summary["fates"]["dropped"]) == {"segments failed"}
