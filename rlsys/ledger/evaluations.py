"""The responses of evaluations, one row each: `step-000050.parquet` has those of the evaluation at step 50."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlsys.durable import writing
from rlsys.ledger.codec import SCHEMA, as_json, write_rows
from rlsys.types import ScoredGroup

FOLDER = "evaluations"  # within the rollout store

_AS_ROLLOUTS = (
    *("prompt_id", "task", "prompt", "answer", "sample", "text", "version_spans", "finish_reason"),
    *("reward_status", "score", "components", "reward_detail"),
)
EVALUATION_SCHEMA = pa.schema(
    [*(SCHEMA.field(name) for name in _AS_ROLLOUTS), ("tokens", pa.int32()), ("step", pa.int64())]
)
# Only what repeats is worth a dictionary.
_DICTIONARY = [field.name for field in EVALUATION_SCHEMA if field.type == pa.string() and field.name != "text"]


def responses_of(group: ScoredGroup) -> list[dict[str, Any]]:
    """Rows of `EVALUATION_SCHEMA`, but for the step: nobody trains on them, so only the number of tokens is kept."""
    prompt = group.prompt
    return [
        {
            "prompt_id": prompt.id,
            "task": prompt.task,
            "prompt": prompt.text,
            "answer": prompt.answer,
            "sample": rollout.sample,
            "text": rollout.text,
            "version_spans": [span._asdict() for span in rollout.version_spans],
            "finish_reason": rollout.finish_reason,
            "reward_status": reward.status,
            "score": float(reward.score),
            "components": as_json(dict(reward.components)),
            "reward_detail": reward.detail,
            "tokens": len(rollout.token_ids),
        }
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
    ]


def write_evaluation(path: Path, step: int, responses: Sequence[Mapping[str, Any]]) -> None:
    """One file, whole at any time. Raises DiskFullError, RlsysError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{**row, "step": step} for row in responses], schema=EVALUATION_SCHEMA)
    write_rows(table, path, synced=True, compression="zstd", use_dictionary=_DICTIONARY)
