"""Scored groups as Arrow tables, one row per rollout, without loss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rlsys.errors import DataError
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, Segment, VersionSpan

_SPAN = pa.struct([("version", pa.int32()), ("start", pa.int32()), ("end", pa.int32())])
_SEGMENT = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("start_value", pa.float64()), ("end_value", pa.float64())]
)

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int64()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("seed", pa.int64()),
        ("metadata", pa.string()),  # JSON
        ("generator", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("action_mask", pa.list_(pa.bool_())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("version_spans", pa.list_(_SPAN)),
        ("finish_reason", pa.string()),
        ("segments", pa.list_(_SEGMENT)),
        ("parent_sample", pa.int32()),
        ("parent_position", pa.int32()),
        ("reward_status", pa.string()),
        ("score", pa.float64()),  # NaN where unscored
        ("components", pa.string()),  # JSON, reward function -> its own value
        ("reward_detail", pa.string()),
    ]
)
FATE_SCHEMA = SCHEMA.append(pa.field("fate", pa.string())).append(pa.field("step", pa.int64()))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _lists(arrays: Sequence[np.ndarray], dtype: Any, values: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=values))


def encode(scored: ScoredGroup) -> pa.Table:
    """A table of `SCHEMA` with n rows. Raises DataError for prompt metadata that JSON cannot hold."""
    prompt, rollouts, rewards = scored.prompt, scored.rollouts, scored.rewards
    n = len(rollouts)
    try:
        metadata = json.dumps(dict(prompt.metadata), default=_plain)
    except TypeError as error:
        raise DataError(f"prompt {prompt.id}: metadata must be JSON values: {error}") from None
    columns: list[Any] = [
        pa.repeat(prompt.id, n),
        pa.repeat(pa.scalar(prompt.index, pa.int64()), n),
        pa.repeat(prompt.task, n),
        pa.repeat(prompt.text, n),
        _lists([prompt.token_ids] * n, np.int32, pa.int32()),
        pa.repeat(pa.scalar(prompt.answer, pa.string()), n),
        pa.repeat(pa.scalar(prompt.seed, pa.int64()), n),
        pa.repeat(metadata, n),
        pa.repeat(scored.group.generator, n),
        pa.array([r.sample for r in rollouts], pa.int32()),
        pa.array([r.text for r in rollouts], pa.string()),
        _lists([r.token_ids for r in rollouts], np.int32, pa.int32()),
        _lists([r.action_mask for r in rollouts], np.bool_, pa.bool_()),
        _lists([r.behavior_logprobs for r in rollouts], np.float32, pa.float32()),
        pa.array([[s._asdict() for s in r.version_spans] for r in rollouts], SCHEMA.field("version_spans").type),
        pa.array([r.finish_reason for r in rollouts], pa.string()),
        pa.array([[s._asdict() for s in r.segments] for r in rollouts], SCHEMA.field("segments").type),
        pa.array([r.parent[0] if r.parent else None for r in rollouts], pa.int32()),
        pa.array([r.parent[1] if r.parent else None for r in rollouts], pa.int32()),
        pa.array([r.status for r in rewards], pa.string()),
        pa.array([r.score for r in rewards], pa.float64()),
        pa.array([json.dumps(dict(r.components), default=_plain) for r in rewards], pa.string()),
        pa.array([r.detail for r in rewards], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def decode(table: pa.Table) -> ScoredGroup:
    """The group in the rows of one prompt, as `encode` was given it."""
    rows = table.to_pylist()
    if not rows or any(row["prompt_id"] != rows[0]["prompt_id"] for row in rows):
        raise DataError(f"rows of one prompt expected, got {sorted({row['prompt_id'] for row in rows})}")
    first = rows[0]
    prompt = Prompt(
        id=first["prompt_id"],
        index=first["index"],
        token_ids=np.array(first["prompt_token_ids"], np.int32),
        text=first["prompt"],
        task=first["task"],
        answer=first["answer"],
        seed=first["seed"],
        metadata=json.loads(first["metadata"]),
    )
    rollouts = tuple(_rollout(row) for row in rows)
    rewards = tuple(
        Reward(row["reward_status"], row["score"], json.loads(row["components"]), row["reward_detail"]) for row in rows
    )
    return ScoredGroup(RolloutGroup(prompt, rollouts, first["generator"]), rewards)


def _rollout(row: dict[str, Any]) -> Rollout:
    parent = None if row["parent_sample"] is None else (row["parent_sample"], row["parent_position"])
    return Rollout(
        prompt_id=row["prompt_id"],
        sample=row["sample"],
        token_ids=np.array(row["token_ids"], np.int32),
        action_mask=np.array(row["action_mask"], np.bool_),
        behavior_logprobs=np.array(row["behavior_logprobs"], np.float32),
        version_spans=tuple(VersionSpan(**span) for span in row["version_spans"]),
        finish_reason=row["finish_reason"],
        text=row["text"],
        segments=tuple(Segment(**segment) for segment in row["segments"]),
        parent=parent,
    )


def with_fate(table: pa.Table, fate: str, step: int) -> pa.Table:
    """The table with the columns that are known when a group is settled."""
    n = table.num_rows
    columns = [*table.columns, pa.repeat(fate, n), pa.repeat(pa.scalar(step, pa.int64()), n)]
    return pa.Table.from_arrays(columns, schema=FATE_SCHEMA)


def concat(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables(list(tables)).combine_chunks()
