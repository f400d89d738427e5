"""What the driver works out of a group's metadata, by hand."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from rlsys.driver.evaluation import summarize
from rlsys.driver.progress import Recorder, _batch_metrics
from rlsys.metrics import reduce
from rlsys.roles import StepReport
from rlsys.sim.drive import RecordingTracker
from rlsys.types import GroupInfo, Prompt, Reward, Rollout, RolloutGroup, VersionSpan, group_info

NAN = math.nan


def info(*scores: float, **changes: Any) -> GroupInfo:
    return GroupInfo("p/0@0", 0, "g", (4,) * len(scores), 0, 0, scores=scores, **changes)


def test_best_of_n_is_the_mean_of_each_problems_best() -> None:
    found = summarize([info(0.0, 1.0, 0.0), info(0.25, NAN, 0.5), info(NAN, NAN, NAN)], failed=0)
    assert found["accuracy"] == pytest.approx((1 + 0.75) / 5)
    assert found["best_of_n"] == pytest.approx((1.0 + 0.5) / 2)
    assert "best_of_n" not in summarize([info(1.0), info(0.0)], failed=0), "of one sample it is the accuracy"


def test_groups_with_a_signal_have_scores_that_differ() -> None:
    groups = [info(0.0, 1.0, distinct_3=0.5), info(1.0, 1.0, distinct_3=0.1), info(0.5, NAN), info(NAN, NAN)]
    found = reduce(_batch_metrics(groups))
    assert found["groups/with_signal"] == pytest.approx(1 / 3), "the last has no score at all"
    assert found["rollout/distinct_3"] == pytest.approx(0.6 / 4)


def test_reward_components_are_means_over_the_scored_rollouts() -> None:
    """2 of 3 rollouts are scored; `brief` applies to one group only."""
    prompt = Prompt("p/0@0", 0, np.array([1], np.int32), "?", "t", None, seed=0)
    one = Reward("ok", 1.5, {"right": 1.0, "brief": 0.5})
    two = Reward("ok", 0.25, {"right": 0.0, "brief": 0.25})
    lost = Reward("timeout", NAN, {"right": 1.0})
    rewards = (one, lost, two)
    rollouts = tuple(
        Rollout(prompt.id, i, np.array([1], np.int32), np.ones(1, bool), np.zeros(1, np.float32), (), "stop", "")
        for i in range(3)
    )
    first = group_info(RolloutGroup(prompt, rollouts, "g"), rewards)
    second = group_info(RolloutGroup(prompt, rollouts[:1], "g"), (Reward("ok", 1.0, {"right": 1.0}),))
    found = reduce(_batch_metrics([first, second]))
    assert found["reward/component/right"] == pytest.approx(2 / 3)
    assert found["reward/component/brief"] == pytest.approx(0.75 / 2)


def test_old_states_of_prompts_and_branches_add_up() -> None:
    prompt = Prompt("p/0@0", 0, np.array([1], np.int32), "?", "t", None, seed=0)
    infos = [group_info(RolloutGroup(prompt, (), "g", old_states=tokens)) for tokens in (128, 0, 256)]

    async def step() -> dict[str, float]:
        recorder = Recorder(tracker := RecordingTracker())
        recorder.begin()
        recorder.begin_step()
        for found in infos:
            recorder.generated(found)
        recorder.step(StepReport(1, {}, 0, 0.0), [info(0.0, 1.0)], {}, 0, 0)
        return dict(tracker.steps[0][1])

    assert asyncio.run(step())["tokens/old_states"] == 384


def test_distinct_3_counts_different_sequences_of_three() -> None:
    """1 2 3 | 2 3 1 | 3 1 2 and 1 2 3: three different ones of four; a demonstration does not count."""

    def rollout(sample: int, tokens: list[int], origin: Any = "policy") -> Rollout:
        n = len(tokens)
        ids, ones = np.array(tokens, np.int32), np.ones(n, bool)
        spans = (VersionSpan(0, 0, n),)
        return Rollout("p/0@0", sample, ids, ones, np.zeros(n, np.float32), spans, "stop", "", origin=origin)

    prompt = Prompt("p/0@0", 0, np.array([1], np.int32), "?", "t", None, seed=0)
    responses = (rollout(0, [1, 2, 3, 1, 2]), rollout(1, [1, 2, 3]), rollout(2, [7, 7]))
    assert group_info(RolloutGroup(prompt, responses, "g")).distinct_3 == 0.75
    shown = rollout(3, [8, 8, 8, 8], "expert")
    assert group_info(RolloutGroup(prompt, (*responses, shown), "g")).distinct_3 == 0.75
    assert group_info(RolloutGroup(prompt, (rollout(0, [7, 7]),), "g")).distinct_3 == 0
