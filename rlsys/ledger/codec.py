"""Scored groups as Arrow tables, one row per rollout, without loss; and files of them that show damage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.durable import sync, writing
from rlsys.errors import DataError, RlsysError
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, Segment, VersionSpan

_SPAN = pa.struct([("version", pa.int32()), ("start", pa.int32()), ("end", pa.int32())])
_SEGMENT = pa.struct(
    [
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("start_value", pa.float64()),
        ("end_value", pa.float64()),
        ("spread", pa.float64()),
        ("first", pa.bool_()),
    ]
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
        ("origin", pa.string()),
        ("reward_status", pa.string()),
        ("score", pa.float64()),  # NaN where unscored
        ("components", pa.string()),  # JSON, reward function -> its own value
        ("reward_detail", pa.string()),
    ]
)
FATE_SCHEMA = (
    SCHEMA.append(pa.field("fate", pa.string()))
    .append(pa.field("step", pa.int64()))
    .append(pa.field("reference_logprobs", pa.list_(pa.float32())))  # null without a reference
)
_ROWS = b"rows"  # key of their number in the metadata of a file


def as_json(value: Any) -> str:
    """JSON, of NumPy's values, too. Raises TypeError for what JSON cannot hold."""
    return json.dumps(value, default=_plain)


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


def encode(groups: Sequence[ScoredGroup]) -> pa.Table:
    """A table of `SCHEMA`, the rollouts of each group one after the other.

    Raises DataError for prompt metadata that JSON cannot hold.
    """
    prompts = [group.prompt for group in groups]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards]
    counts = [len(group.rollouts) for group in groups]

    def of_prompt(values: Iterable[Any], dtype: pa.DataType) -> pa.Array:
        return pa.array([value for value, n in zip(values, counts, strict=True) for _ in range(n)], dtype)

    columns: list[Any] = [
        of_prompt((p.id for p in prompts), pa.string()),
        of_prompt((p.index for p in prompts), pa.int64()),
        of_prompt((p.task for p in prompts), pa.string()),
        of_prompt((p.text for p in prompts), pa.string()),
        _lists([p.token_ids for p, n in zip(prompts, counts, strict=True) for _ in range(n)], np.int32, pa.int32()),
        of_prompt((p.answer for p in prompts), pa.string()),
        of_prompt((p.seed for p in prompts), pa.int64()),
        of_prompt(map(_metadata, prompts), pa.string()),
        of_prompt((g.group.generator for g in groups), pa.string()),
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
        pa.array([r.origin for r in rollouts], pa.string()),
        pa.array([r.status for r in rewards], pa.string()),
        pa.array([r.score for r in rewards], pa.float64()),
        pa.array([as_json(dict(r.components)) for r in rewards], pa.string()),
        pa.array([r.detail for r in rewards], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _metadata(prompt: Prompt) -> str:
    try:
        return as_json(dict(prompt.metadata))
    except TypeError as error:
        raise DataError(f"prompt {prompt.id}: metadata must be JSON values: {error}") from None


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
        origin=row["origin"],
    )


def reference_of(table: pa.Table) -> tuple[np.ndarray, ...] | None:
    """The reference log-probs of a settled group's rows, float32 [T] each; None where there are none."""
    rows = table.column("reference_logprobs").to_pylist() if "reference_logprobs" in table.column_names else [None]
    return None if None in rows else tuple(np.array(row, np.float32) for row in rows)


def with_fates(
    tables: Sequence[pa.Table],
    fates: Sequence[tuple[str, int]],
    reference: Sequence[Sequence[np.ndarray] | None] | None = None,
) -> pa.Table:
    """All rows in one table, with what is known once a group is settled: the (fate, step) of each table, and its
    reference log-probs."""
    rows = [(fate, step) for table, (fate, step) in zip(tables, fates, strict=True) for _ in range(table.num_rows)]
    whole = pa.concat_tables(tables).combine_chunks()
    columns = [
        *whole.columns,
        pa.array([fate for fate, _ in rows], pa.string()),
        pa.array([step for _, step in rows], pa.int64()),
        pa.array(
            [
                array
                for table, arrays in zip(tables, reference or [None] * len(tables), strict=True)
                for array in ([None] * table.num_rows if arrays is None else arrays)
            ],
            pa.list_(pa.float32()),
        ),
    ]
    return pa.Table.from_arrays(columns, schema=FATE_SCHEMA)


def write_rows(table: pa.Table, path: Path, synced: bool = False, **options: Any) -> None:
    """Write a Parquet file, aside and then renamed. `options` are those of `pyarrow.parquet.write_table`.

    `synced`: its rows are on the disk before it has its name, so that a loss of power leaves no empty file.

    Raises DiskFullError, RlsysError; pyarrow has removed what was written of it then.
    """
    aside = path.with_suffix(".tmp")
    counted = table.replace_schema_metadata({_ROWS: str(table.num_rows)})
    try:
        with writing(path):
            pq.write_table(counted, aside, write_page_checksum=True, **options)
            if synced:
                sync(aside)
            aside.rename(path)
    except (OSError, pa.ArrowException) as error:
        raise RlsysError(f"{path} cannot be written: {error}") from error


def read_rows(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows that `write_rows` wrote, of the `schema` they had; only some `columns` of it, if they are given.

    Raises DataError when the file is damaged: there are checksums of its data, and what is beside them has to be as the
    schema says, and to say the same twice.
    """
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns), page_checksum_verification=True)
        table.validate(full=True)
        rows = int((table.schema.metadata or {}).get(_ROWS, -1))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not table.schema.equals(schema):
        raise DataError(f"{path} is damaged, or of another version of rlsys: its columns are not as expected")
    if table.num_rows != rows:
        raise DataError(f"{path} is damaged: it has {table.num_rows} rows, expected {rows}")
    return table
