"""Pad groups into a `RolloutBatch`, and join it with advantages and weights into a `TrainBatch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from rlsys.boundary import segments_fault
from rlsys.errors import LearnerError, NonFiniteError
from rlsys.types import Reward, Rollout, RolloutBatch, ScoredGroup, TrainBatch

LARGEST = float(np.finfo(np.float32).max)

Batch = TypeVar("Batch", RolloutBatch, TrainBatch)


def collate(groups: Sequence[ScoredGroup], reference: Sequence[Sequence[np.ndarray]] | None = None) -> RolloutBatch:
    """Right-padded arrays of all rollouts of `groups`, in order; group i gets number i in `group_B`.

    Columns of `components_BK` are the reward functions that had a value for any rollout, by name.

    `reference[i][j]` is the reference policy's float32 [T] log-probs of rollout j of group i. T and L are at least 1.
    An unscored rollout keeps its row, with an empty mask.

    Raises LearnerError for arrays of the wrong shape, segments outside of a response or a rewarded rollout without a
    finite score; NonFiniteError for a log-prob that is not finite: the reference's of any token, the generator's of a
    trained one. Both name the rollout and the role it comes from.
    """
    if reference is not None and len(reference) != len(groups):
        raise LearnerError(f"{len(groups)} groups came with the reference log-probs of {len(reference)}", kind="shape")
    rows: list[tuple[str, np.ndarray, Rollout, Reward, np.ndarray | None]] = []
    numbers: list[int] = []
    for number, group in enumerate(groups):
        if len(group.rollouts) != len(group.rewards):
            raise LearnerError(
                f"{group.prompt.id}: {len(group.rollouts)} rollouts but {len(group.rewards)} rewards, "
                "from the reward worker",
                kind="rewards",
            )
        arrays = [None] * len(group.rollouts) if reference is None else reference[number]
        if len(arrays) != len(group.rollouts):
            raise LearnerError(
                f"{group.prompt.id}: {len(group.rollouts)} rollouts but reference log-probs of {len(arrays)}, "
                "from the reference",
                kind="shape",
            )
        for rollout, reward, row_reference in zip(group.rollouts, group.rewards, arrays, strict=True):
            name = f"{group.prompt.id}#{rollout.sample}"
            _check(name, group.group.generator, rollout, reward, row_reference)
            rows.append((name, group.prompt.token_ids, rollout, reward, row_reference))
            numbers.append(number)

    count = len(rows)
    prompt_lengths = np.array([len(prompt) for _, prompt, *_ in rows], dtype=np.int64)
    response_lengths = np.array([len(rollout.token_ids) for _, _, rollout, *_ in rows], dtype=np.int64)
    width = int(max(response_lengths, default=0)) or 1
    full_width = int(max(prompt_lengths + response_lengths, default=0)) or 1
    input_ids = np.zeros((count, full_width), dtype=np.int64)
    mask = np.zeros((count, width), dtype=bool)
    behavior = np.zeros((count, width), dtype=np.float32)
    versions = np.full((count, width), -1, dtype=np.int32)
    reference_logprobs = None if reference is None else np.zeros((count, width), dtype=np.float32)
    scores = np.full(count, np.nan, dtype=np.float32)
    scored = np.zeros(count, dtype=bool)
    component_names = tuple(sorted({name for _, _, _, reward, _ in rows for name in reward.components}))
    components = np.full((count, len(component_names)), np.nan, dtype=np.float32)
    origins = np.array([rollout.origin for _, _, rollout, *_ in rows], dtype=object)
    for b, (_, prompt, rollout, reward, row_reference) in enumerate(rows):
        start, length = len(prompt), len(rollout.token_ids)
        input_ids[b, :start] = prompt
        input_ids[b, start : start + length] = rollout.token_ids
        behavior[b, :length] = rollout.behavior_logprobs
        versions[b, :length] = rollout.versions
        scored[b] = reward.status == "ok"
        if scored[b]:
            scores[b] = reward.score
            mask[b, :length] = rollout.action_mask & (rollout.origin != "greedy")
            components[b] = [reward.components.get(name, np.nan) for name in component_names]
        if reference_logprobs is not None and row_reference is not None:
            reference_logprobs[b, :length] = row_reference
    segments = None
    if any(rollout.segments for _, _, rollout, *_ in rows):
        segments = np.full((count, width, 4), np.nan, dtype=np.float32)
        for b, (_, _, rollout, *_) in enumerate(rows):
            for segment in rollout.segments:
                values = (segment.start_value, segment.end_value, segment.spread, segment.first)
                segments[b, segment.start : segment.end] = [np.nan if v is None else float(v) for v in values]
    return RolloutBatch(
        input_ids_BL=input_ids,
        prompt_lengths_B=prompt_lengths,
        response_lengths_B=response_lengths,
        mask_BT=mask,
        behavior_logprobs_BT=behavior,
        versions_BT=versions,
        scores_B=scores,
        scored_B=scored,
        group_B=np.array(numbers, dtype=np.int64),
        names_B=tuple(name for name, *_ in rows),
        reference_logprobs_BT=reference_logprobs,
        texts_B=tuple(rollout.text for _, _, rollout, *_ in rows),
        tasks_B=tuple(group.prompt.task for group in groups for _ in group.rollouts),
        components_BK=components,
        component_names=component_names,
        finished_B=np.array([rollout.finish_reason == "stop" for _, _, rollout, *_ in rows], dtype=bool),
        expert_B=origins == "expert",
        greedy_B=origins == "greedy",
        segments_BTF=segments,
        explored_B=(origins == "hotter").astype(np.int8) - (origins == "colder").astype(np.int8),
    )


def _check(name: str, generator: str, rollout: Rollout, reward: Reward, reference: np.ndarray | None) -> None:
    length = len(rollout.token_ids)
    arrays: list[tuple[str, str, np.ndarray]] = [
        (generator, "action_mask", rollout.action_mask),
        (generator, "behavior_logprobs", rollout.behavior_logprobs),
    ]
    if reference is not None:
        arrays.append(("the reference", "reference log-probs", reference))
    for role, what, array in arrays:
        if array.shape != (length,):
            raise LearnerError(
                f"{name}: {what} of shape {list(array.shape)} for {length} response tokens, from {role}", kind="shape"
            )
    if fault := segments_fault(rollout.segments, length):
        raise LearnerError(f"{name}: {fault.words}, from the reward worker", kind=fault.kind)
    # It computes all of them, those that are not trained on, too.
    if reference is not None and not np.isfinite(reference).all():
        bad = np.flatnonzero(~np.isfinite(reference))[0]
        raise NonFiniteError(
            f"{name}: reference log-prob of response token {bad} is {reference[bad]}, from the reference",
            kind="log-probs",
        )
    if reward.status != "ok":
        return
    for what, value in {"score": reward.score, **reward.components}.items():
        if not abs(value) <= LARGEST:
            raise LearnerError(
                f"{name}: its reward has status 'ok' but the {what} {value}, from the reward worker", kind="rewards"
            )
    bad_ones = np.flatnonzero(~np.isfinite(rollout.behavior_logprobs) & rollout.action_mask)
    if bad_ones.size:
        value = rollout.behavior_logprobs[bad_ones[0]]
        raise NonFiniteError(
            f"{name}: behavior_logprobs of response token {bad_ones[0]} is {value}, from {generator}", kind="log-probs"
        )


def build_train_batch(
    rollouts: RolloutBatch,
    advantages: np.ndarray,
    aggregation_weights: np.ndarray,
    proximal: np.ndarray | None = None,
    values: np.ndarray | None = None,
    returns: np.ndarray | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
) -> TrainBatch:
    """One optimizer step's worth of rows; every array is [B, T], and is made float32 and 0 where masked.

    Raises LearnerError for an array of another shape, NonFiniteError naming the first rollout with a number that is
    not finite on a trained token.
    """

    def prepared(what: str, array: np.ndarray | None) -> Any:
        if array is None:
            return None
        if array.shape != rollouts.mask_BT.shape:
            raise LearnerError(f"{what} have shape {array.shape}, the batch has {rollouts.mask_BT.shape}")
        bad = np.argwhere(~np.isfinite(array) & rollouts.mask_BT)
        if len(bad):
            row, token = bad[0]
            raise NonFiniteError(f"{rollouts.names_B[row]}: {what} of response token {token} are {array[row, token]}")
        return np.where(rollouts.mask_BT, array, 0).astype(np.float32)

    return TrainBatch(
        rollouts=rollouts,
        advantages_BT=prepared("advantages", advantages),
        loss_weights_BT=prepared("loss weights", aggregation_weights),
        proximal_logprobs_BT=prepared("proximal log-probs", proximal),
        values_BT=prepared("values", values),
        returns_BT=prepared("returns", returns),
        extras_BT={name: prepared(name, array) for name, array in (extras or {}).items()},
    )


def select_rows(batch: Batch, rows: Sequence[int] | np.ndarray) -> Batch:
    """The given rows in the given order, with padding cut to the longest of them (at least one column).

    Group numbers and loss weights stay as they are: they are relative to the batch the rows come from.
    """
    index = np.asarray(rows, dtype=np.int64)
    rollouts = batch if isinstance(batch, RolloutBatch) else batch.rollouts
    lengths = rollouts.response_lengths_B[index]
    width = int(max(lengths, default=0)) or 1
    full_width = int(max(rollouts.prompt_lengths_B[index] + lengths, default=0)) or 1

    def taken(source: object) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for field in fields(source):  # type: ignore[arg-type]
            value = getattr(source, field.name)
            if field.name.endswith("_BL"):
                out[field.name] = value[index, :full_width]
            elif isinstance(value, Mapping):
                out[field.name] = {name: array[index, :width] for name, array in value.items()}
            elif value is None:
                continue
            elif field.name.endswith(("_BT", "_BTF")):
                out[field.name] = value[index, :width]
            elif isinstance(value, tuple) and field.name.endswith("_B"):
                out[field.name] = tuple(value[i] for i in index) if value else ()
            elif field.name.endswith(("_B", "_BK")):
                out[field.name] = value[index]
        return out

    selected = replace(rollouts, **taken(rollouts))
    if isinstance(batch, RolloutBatch):
        return selected
    return replace(batch, rollouts=selected, **taken(batch))
