"""The rollout store: every finished group of a run, on disk, in Parquet.

    RUN/rollouts/pending/000000017.parquet   one buffered group until its fate is known, by the index of its prompt
    RUN/rollouts/step-000012.parquet         what was trained at step 12, and dropped since the step before
    RUN/rollouts/after-000100.parquet        what was dropped after the last step of a process

Files are written aside and renamed, so that a reader never sees half of one. Writes happen on a thread of their own.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlsys.errors import RlsysError
from rlsys.ledger.codec import concat, decode, encode, with_fate
from rlsys.roles import Handle, SampleRow, Scored
from rlsys.types import ScoredGroup, group_info

logger = logging.getLogger(__name__)

# Only text repeats enough for a dictionary to pay.
_DICTIONARY = [
    *("prompt_id", "task", "prompt", "answer", "metadata", "generator", "finish_reason"),
    *("reward_status", "components", "reward_detail", "fate"),
]


async def _identity(value: Any) -> Any:
    return value


@dataclass(slots=True)
class _Pending:
    path: Path
    table: pa.Table
    fate: str | None = None
    step: int = -1


class RolloutStore:
    """`rlsys.roles.RolloutStore` in one process.

    `fetch` opens a handle of a ScoredGroup, `put` makes one (Ray: await the reference, `ray.put`; in one process both
    hand the value on). A group stays in memory until it is settled, which the staleness bound limits.
    """

    def __init__(
        self,
        directory: Path,
        fetch: Callable[[Handle], Awaitable[ScoredGroup]] = _identity,
        put: Callable[[ScoredGroup], Awaitable[Handle]] = _identity,
    ) -> None:
        self.directory = directory
        self._fetch = fetch
        self._put = put
        self._pending_dir = directory / "pending"
        self._pending_dir.mkdir(parents=True, exist_ok=True)
        self._pending: dict[str, _Pending] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-store")
        self._last: tuple[int, pa.Table | None] = (-1, None)  # newest step and what it trained
        self._step = 0  # newest step settled by this process

    async def buffered(self, group: Handle) -> None:
        """Write a scored group, so that it outlives this process."""
        scored = await self._fetch(group)
        path = self._pending_dir / f"{scored.prompt.index:09d}.parquet"
        table = await self._run(_write_pending, scored, path)
        self._pending[scored.prompt.id] = _Pending(path, table)

    async def settled(self, prompt_ids: Sequence[str], fate: str, step: int) -> None:
        """Record the fate of buffered groups. "trained" closes the file of `step`; dropped ones wait for that."""
        for prompt_id in prompt_ids:
            pending = self._find(prompt_id)
            pending.fate, pending.step = fate, step
        if fate == "trained":
            self._step = step
            trained = await self._close_file(self.directory / f"step-{step:06d}.parquet", "trained")
            self._last = (step, trained)

    async def discard(self, prompt_ids: Sequence[str]) -> None:
        """Forget buffered groups: they will be sampled again, or are in a final file already."""
        await self._run(_unlink, [self._pending.pop(prompt_id).path for prompt_id in prompt_ids])

    async def load_buffered(self) -> Mapping[str, Scored]:
        """Groups that an earlier process left buffered, by prompt id. A file that cannot be read is passed over."""
        found: dict[str, Scored] = {}
        for path in sorted(self._pending_dir.glob("*.parquet")):
            try:
                table = await self._run(pq.read_table, path)
                scored = await self._run(decode, table)
            except (OSError, pa.ArrowException, RlsysError) as error:
                logger.warning("passing over the buffered group in %s, which cannot be read: %s", path, error)
                continue
            self._pending[scored.prompt.id] = _Pending(path, table)
            found[scored.prompt.id] = Scored(group_info(scored.group, scored.rewards), await self._put(scored))
        return found

    async def roll_back(self, version: int) -> None:
        """Take away the final files of what happened after the checkpoint of `version`."""
        files = [path for path in self.directory.glob("*.parquet") if _is_after(path, version)]
        await self._run(_unlink, files)
        self._step = version

    async def samples(self, step: int, limit: int) -> Sequence[SampleRow]:
        """The first rollout of a few prompts trained at `step`, if that is the newest settled step."""
        last, table = self._last
        if step != last or table is None or limit < 1:
            return []
        return await self._run(_samples, table, step, limit)

    async def close(self) -> None:
        """Write the groups that were dropped after the last step, and end the thread."""
        await self._close_file(self.directory / f"after-{self._step:06d}.parquet", "")
        self._thread.shutdown(wait=True)

    def _find(self, prompt_id: str) -> _Pending:
        if prompt_id not in self._pending:
            raise RlsysError(f"rollout store {self.directory}: {prompt_id} is settled, but was never buffered")
        return self._pending[prompt_id]

    async def _close_file(self, path: Path, wanted: str) -> pa.Table | None:
        """Move every group whose fate is known into `path`; returns the rows whose fate is `wanted`."""
        done = [self._pending.pop(prompt_id) for prompt_id, p in list(self._pending.items()) if p.fate is not None]
        if not done:
            return None
        return await self._run(_write_final, done, path, wanted)

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def _is_after(path: Path, version: int) -> bool:
    kind, _, number = path.stem.partition("-")
    return number.isdecimal() and (
        (kind == "step" and int(number) > version) or (kind == "after" and int(number) >= version)
    )


def _write(table: pa.Table, path: Path, **options: Any) -> None:
    aside = path.with_suffix(".tmp")
    pq.write_table(table, aside, **options)
    aside.rename(path)


def _write_pending(scored: ScoredGroup, path: Path) -> pa.Table:
    table = encode(scored)
    _write(table, path, compression="NONE", use_dictionary=False, write_statistics=False)
    return table


def _write_final(done: Sequence[_Pending], path: Path, wanted: str) -> pa.Table | None:
    tables = [with_fate(p.table, p.fate or "", p.step) for p in done]
    _write(concat(tables), path, compression="zstd", use_dictionary=_DICTIONARY)
    _unlink([p.path for p in done])
    kept = [table for table, p in zip(tables, done, strict=True) if p.fate == wanted]
    return pa.concat_tables(kept) if kept else None


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _samples(table: pa.Table, step: int, limit: int) -> list[SampleRow]:
    columns = ["prompt_id", "sample", "prompt", "text", "answer", "score", "version_spans", "finish_reason"]
    first_rows = [row for row in table.select(columns).to_pylist() if row["sample"] == 0]
    stride = max(1, math.ceil(len(first_rows) / limit))
    return [
        SampleRow(
            step=step,
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            response=row["text"],
            answer=row["answer"],
            score=row["score"],
            versions="-".join(str(v) for v in sorted({span["version"] for span in row["version_spans"]})),
            finish_reason=row["finish_reason"],
        )
        for row in first_rows[::stride][:limit]
    ]
