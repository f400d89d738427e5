"""Collating, selecting rows and building train batches."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.batches import build_train_batch, collate, select_rows
from rlsys.errors import LearnerError, NonFiniteError
from rlsys.types import Prompt, Reward, Rollout, RolloutBatch, RolloutGroup, ScoredGroup, Segment, VersionSpan


def group(name: str, prompt: list[int], responses: list[list[int]], scores: list[float | None]) -> ScoredGroup:
    """Token 9 stands for a tool's output; score None for a time-out. Log-probs are -token/10, version 3."""
    rollouts = tuple(
        Rollout(
            prompt_id=name,
            sample=i,
            token_ids=np.array(tokens, dtype=np.int32),
            action_mask=np.array([t != 9 for t in tokens], dtype=bool),
            behavior_logprobs=np.array([-t / 10 for t in tokens], dtype=np.float32),
            version_spans=(VersionSpan(3, 0, len(tokens)),),
            finish_reason="stop",
            text="",
        )
        for i, tokens in enumerate(responses)
    )
    rewards = tuple(Reward("ok", s) if s is not None else Reward("timeout", float("nan")) for s in scores)
    source = Prompt(name, 0, np.array(prompt, dtype=np.int32), "", "task", None, 0)
    return ScoredGroup(RolloutGroup(source, rollouts, "generator-0"), rewards)


@pytest.fixture(scope="module")
def two_groups() -> list[ScoredGroup]:
    return [
        group("a", [1, 2], [[5, 9, 6], [7]], [1.0, None]),
        group("b", [3], [[4, 4, 4, 4]], [0.5]),
    ]


def test_collate_by_hand(two_groups: list[ScoredGroup]) -> None:
    reference = [[np.array([-1, -2, -3]), np.array([-4])], [np.array([-5, -6, -7, -8])]]
    batch = collate(two_groups, reference)
    assert batch.rows == 3
    assert batch.names_B == ("a#0", "a#1", "b#0")
    np.testing.assert_array_equal(batch.input_ids_BL, [[1, 2, 5, 9, 6], [1, 2, 7, 0, 0], [3, 4, 4, 4, 4]])
    np.testing.assert_array_equal(batch.prompt_lengths_B, [2, 2, 1])
    np.testing.assert_array_equal(batch.response_lengths_B, [3, 1, 4])
    np.testing.assert_array_equal(
        batch.mask_BT, [[True, False, True, False], [False] * 4, [True, True, True, True]]
    )  # a tool's token, an unscored rollout
    np.testing.assert_allclose(
        batch.behavior_logprobs_BT, [[-0.5, -0.9, -0.6, 0], [-0.7, 0, 0, 0], [-0.4] * 4], rtol=1e-6
    )
    np.testing.assert_array_equal(batch.versions_BT, [[3, 3, 3, -1], [3, -1, -1, -1], [3] * 4])
    np.testing.assert_array_equal(batch.scores_B, np.array([1.0, np.nan, 0.5], dtype=np.float32))
    np.testing.assert_array_equal(batch.scored_B, [True, False, True])
    np.testing.assert_array_equal(batch.group_B, [0, 0, 1])
    np.testing.assert_array_equal(batch.reference_logprobs_BT, [[-1, -2, -3, 0], [-4, 0, 0, 0], [-5, -6, -7, -8]])
    np.testing.assert_array_equal(batch.finished_B, [True, True, True])
    arrays = {f.name: getattr(batch, f.name) for f in fields(batch)}
    types = {name: array.dtype for name, array in arrays.items() if isinstance(array, np.ndarray)}
    assert types == {
        "input_ids_BL": np.int64,
        "prompt_lengths_B": np.int64,
        "response_lengths_B": np.int64,
        "mask_BT": np.bool_,
        "behavior_logprobs_BT": np.float32,
        "versions_BT": np.int32,
        "scores_B": np.float32,
        "scored_B": np.bool_,
        "group_B": np.int64,
        "reference_logprobs_BT": np.float32,
        "components_BK": np.float32,
        "finished_B": np.bool_,
        "expert_B": np.bool_,
        "greedy_B": np.bool_,
        "explored_B": np.int8,
    }


def test_without_reference_and_without_groups(two_groups: list[ScoredGroup]) -> None:
    assert collate(two_groups).reference_logprobs_BT is None
    empty = collate([])
    assert (empty.rows, empty.mask_BT.shape, empty.input_ids_BL.shape) == (0, (0, 1), (0, 1))


def broken(two_groups: list[ScoredGroup], row: int = 0, **changes: object) -> list[ScoredGroup]:
    first = two_groups[0]
    rollouts = list(first.rollouts)
    rollouts[row] = replace(rollouts[row], **changes)  # type: ignore[arg-type]
    return [replace(first, group=replace(first.group, rollouts=tuple(rollouts))), two_groups[1]]


def test_collate_names_what_is_wrong(two_groups: list[ScoredGroup]) -> None:
    def refused(error: type[LearnerError], message: str, groups: list[ScoredGroup], reference: Any = None) -> None:
        with pytest.raises(error, match=message) as caught:
            collate(groups, reference)
        assert caught.value.kind

    def scored(reward: Reward) -> list[ScoredGroup]:
        return [replace(two_groups[0], rewards=(reward, two_groups[0].rewards[1]))]

    mine, theirs, judge = "from generator-0$", "from the reference$", "from the reward worker$"
    short, flat = np.zeros(2, dtype=np.float32), np.zeros((3, 1), dtype=np.float32)
    for array in (short, flat):
        shape = re.escape(str(list(array.shape)))
        refused(
            LearnerError,
            f"a#0: behavior_logprobs of shape {shape} for 3 response tokens, {mine}",
            broken(two_groups, behavior_logprobs=array),
        )
        refused(
            LearnerError,
            f"a#0: reference log-probs of shape {shape} for 3 response tokens, {theirs}",
            two_groups,
            [[array, np.zeros(1)], [np.zeros(4)]],
        )
    refused(
        LearnerError,
        f"a#0: action_mask of shape .4. for 3 response tokens, {mine}",
        broken(two_groups, action_mask=np.ones(4, dtype=bool)),
    )
    refused(
        NonFiniteError,
        f"a#0: behavior_logprobs of response token 2 is nan, {mine}",
        broken(two_groups, behavior_logprobs=np.array([0, np.nan, np.nan], dtype=np.float32)),
    )
    refused(
        LearnerError,
        r"a#0: segment \[1, 4\) is outside of its 3 tokens",
        broken(two_groups, segments=(Segment(0, 1), Segment(1, 4))),
    )
    refused(
        LearnerError,
        f"a: 2 rollouts but 1 rewards, {judge}",
        [replace(two_groups[0], rewards=two_groups[0].rewards[:1])],
    )
    for number in (float("nan"), 1e39):  # the second is infinite as float32
        said = re.escape(str(number))
        refused(
            LearnerError, f"a#0: its reward has status 'ok' but the score {said}, {judge}", scored(Reward("ok", number))
        )
        refused(LearnerError, f"the part {said}, {judge}", scored(Reward("ok", 1.0, {"part": number})))
    refused(LearnerError, "2 groups came with the reference log-probs of 1", two_groups, [[np.zeros(3), np.zeros(1)]])
    refused(
        LearnerError,
        f"a: 2 rollouts but reference log-probs of 1, {theirs}",
        two_groups,
        [[np.zeros(3)], [np.zeros(4)]],
    )
    refused(  # of an unscored rollout, too: the reference computes all of them
        NonFiniteError,
        f"a#1: reference log-prob of response token 0 is inf, {theirs}",
        two_groups,
        [[np.zeros(3), np.array([np.inf])], [np.zeros(4)]],
    )


def test_what_is_not_trained_on_may_be_anything(two_groups: list[ScoredGroup]) -> None:
    """A tool's token and an unscored rollout have no log-prob that matters."""
    bad = np.array([0, np.nan, 0], dtype=np.float32)
    assert collate(broken(two_groups, behavior_logprobs=bad)).rows == 3
    assert collate(broken(two_groups, row=1, behavior_logprobs=np.array([np.nan], dtype=np.float32))).rows == 3


# ---- train batches and rows ---------------------------------------------------------------------------------------


def test_build_train_batch_masks(two_groups: list[ScoredGroup]) -> None:
    rollouts = collate(two_groups)
    ones = np.ones((3, 4))
    batch = build_train_batch(
        rollouts, 2 * ones, ones / 6, proximal=-ones, values=np.where(rollouts.mask_BT, 1, np.nan)
    )
    assert batch.rollouts is rollouts
    for array, value in (
        (batch.advantages_BT, 2),
        (batch.loss_weights_BT, 1 / 6),
        (batch.proximal_logprobs_BT, -1),
        (batch.values_BT, 1),
    ):
        assert array is not None
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, np.where(rollouts.mask_BT, value, 0), rtol=1e-6)
    assert batch.returns_BT is None


def test_build_train_batch_names_what_is_wrong(two_groups: list[ScoredGroup]) -> None:
    rollouts = collate(two_groups)
    ones = np.ones((3, 4))
    with pytest.raises(LearnerError, match=r"advantages have shape \(3, 3\), the batch has \(3, 4\)"):
        build_train_batch(rollouts, ones[:, :3], ones)
    bad = ones.copy()
    bad[2, 1] = np.inf
    with pytest.raises(NonFiniteError, match="b#0: values of response token 1 are inf"):
        build_train_batch(rollouts, ones, ones, values=bad)


def test_select_rows_trims_padding(two_groups: list[ScoredGroup]) -> None:
    rollouts = collate(two_groups)
    ones = np.ones((3, 4))
    batch = build_train_batch(rollouts, ones, ones)
    picked = select_rows(batch, [1, 0])
    assert picked.rollouts.names_B == ("a#1", "a#0")
    np.testing.assert_array_equal(picked.rollouts.input_ids_BL, [[1, 2, 7, 0, 0], [1, 2, 5, 9, 6]])
    np.testing.assert_array_equal(picked.advantages_BT, [[0, 0, 0], [1, 0, 1]])
    assert picked.values_BT is None
    assert select_rows(rollouts, [1]).input_ids_BL.tolist() == [[1, 2, 7]]
    none = select_rows(batch, [])
    assert (none.rollouts.rows, none.advantages_BT.shape, none.rollouts.input_ids_BL.shape) == (0, (0, 1), (0, 1))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 6), min_size=1, max_size=3)), min_size=1),
    data=st.data(),
)
def test_selected_rows_equal_the_collation_of_those_rollouts(sizes, data) -> None:  # type: ignore[no-untyped-def]
    """Selecting whole groups is the same as collating only them."""
    groups = [
        group(f"g{i}", [1] * prompt, [[2 + j] * n for j, n in enumerate(lengths)], [0.5] * len(lengths))
        for i, (prompt, lengths) in enumerate(sizes)
    ]
    chosen = data.draw(st.lists(st.integers(0, len(groups) - 1), unique=True, min_size=1))
    whole = collate(groups)
    rows = [row for g in chosen for row in np.flatnonzero(whole.group_B == g)]
    selected, expected = select_rows(whole, rows), collate([groups[g] for g in chosen])
    for field in fields(RolloutBatch):
        if field.name not in ("group_B", "reference_logprobs_BT"):
            np.testing.assert_array_equal(getattr(selected, field.name), getattr(expected, field.name))
