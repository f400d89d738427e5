"""The rollout store: every finished group of a run, on disk, in Parquet.

    RUN/rollouts/pending/000000017.parquet   buffered groups, until their fate is known
    RUN/rollouts/step-000012.parquet         what was trained at step 12, and dropped since the step before
    RUN/rollouts/after-000100.parquet        what was dropped after the last step of a process
    RUN/rollouts/evaluations/step-000050.parquet   what held-out prompts were answered at step 50

Files are written aside and renamed, so that a reader never sees half of one, and with checksums. Writes happen on a
thread of their own. They raise DiskFullError.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rlsys.durable import writing
from rlsys.errors import DataError, HandleLost, RlsysError
from rlsys.ledger.codec import FATE_SCHEMA, SCHEMA, decode, encode, read_rows, reference_of, with_fates, write_rows
from rlsys.ledger.evaluations import FOLDER, responses_of, write_evaluation
from rlsys.roles import Handle, SampleRow, Scored, TrainItem
from rlsys.types import ScoredGroup, group_info

logger = logging.getLogger(__name__)

# Only text repeats enough for a dictionary to pay.
_DICTIONARY = [
    *("prompt_id", "task", "prompt", "answer", "metadata", "generator", "finish_reason"),
    *("reward_status", "components", "reward_detail", "fate"),
]

# Buffered groups are soon read again or deleted.
_FAST: dict[str, Any] = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}


def _as_they_are(handles: Sequence[Any]) -> Sequence[Any]:
    return handles


async def _identity(value: Any) -> Any:
    return value


@dataclass(slots=True, eq=False)
class _File:
    """A file of buffered groups; it goes when the last of them is settled."""

    path: Path
    groups: int


@dataclass(slots=True)
class _Pending:
    table: pa.Table
    file: _File
    fate: str | None = None
    step: int = -1
    reference: Sequence[Any] | None = None  # float32 [T] of each rollout


class Settled(NamedTuple):
    """A group of a final file, with the reference log-probs of its rollouts, float32 [T] each, where it has them."""

    group: ScoredGroup
    reference: Sequence[np.ndarray] | None


class RolloutStore:
    """`rlsys.roles.RolloutStore` in one process.

    `fetch` opens handles (of a ScoredGroup, or of its reference log-probs) on the store's own thread, and gives a
    HandleLost in the place of what is gone; `put` makes one (Ray: `ray.get`, `ray.put`; in one process both hand the
    values on). A group stays in memory until it is settled, which the staleness bound limits. Groups that are finished
    while a file is being written, or within `linger_s`, go into the next one together: a file costs as much as ten
    groups do.
    """

    def __init__(
        self,
        directory: Path,
        fetch: Callable[[Sequence[Handle]], Sequence[Any]] = _as_they_are,
        put: Callable[[Any], Awaitable[Handle]] = _identity,
        linger_s: float = 0.0,
    ) -> None:
        self.directory = directory
        self._fetch = fetch
        self._put = put
        self._linger_s = linger_s
        self._pending_dir = directory / "pending"
        with writing(directory):
            self._pending_dir.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count(1 + max((int(p.stem) for p in self._pending_files()), default=-1))
        self._pending: dict[str, _Pending] = {}
        self._unwritten: list[tuple[Handle, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-store")
        self._last: tuple[int, pa.Table | None] = (-1, None)  # newest step and what it trained
        self._step = 0  # newest step settled by this process

    async def buffered(self, group: Handle) -> None:
        """Return when the scored group is in a file, so that it outlives this process. Raises HandleLost."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unwritten.append((group, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_pending())
        await written

    async def settled(
        self, prompt_ids: Sequence[str], fate: str, step: int, reference: Sequence[Handle | None] = ()
    ) -> None:
        """Record the fate of buffered groups. A batch closes the file of `step`: it is trained, or has a `reference`
        (of None each, where there is none) although its step was skipped. Others wait for that."""
        handles = [handle for handle in reference if handle is not None]
        arrays = await self._run(self._opened, handles) if handles else []
        for prompt_id, found in zip(prompt_ids, arrays, strict=False):  # all of them have reference log-probs, or none
            if prompt_id in self._pending:
                self._pending[prompt_id].reference = found
        for prompt_id in prompt_ids:
            if prompt_id not in self._pending:
                raise RlsysError(f"rollout store {self.directory}: {prompt_id} is settled, but was never buffered")
            pending = self._pending[prompt_id]
            pending.fate, pending.step = fate, step
        if fate == "trained" or reference:
            self._step = step
            final = await self._close_file(step_file(self.directory, step))
            self._last = (step, final)

    async def load(self, prompt_ids: Sequence[str], step: int) -> list[TrainItem]:
        """Groups settled at a step, in the given order, with handles of their own. Raises what `read_settled` does."""
        waiting = {i: self._pending[i] for i in prompt_ids if i in self._pending}  # without a fate, or not yet written
        written = [i for i in prompt_ids if i not in waiting]
        found = dict(zip(written, await self._run(read_settled, self.directory, written, step), strict=True))
        for prompt_id, pending in waiting.items():
            found[prompt_id] = Settled(await self._run(decode, pending.table), pending.reference)
        items = []
        for prompt_id in prompt_ids:
            scored, reference = found[prompt_id]
            handles = await self._put(scored), None if reference is None else await self._put(reference)
            items.append(TrainItem(group_info(scored.group, scored.rewards), *handles))
        return items

    async def discard(self, prompt_ids: Sequence[str]) -> None:
        """Forget buffered groups: they will be sampled again, or are in a final file already."""
        files = {id(file): file for file in (self._pending.pop(prompt_id).file for prompt_id in prompt_ids)}
        for file in files.values():  # written anew without them, so that no later process finds them
            kept = {prompt_id: p for prompt_id, p in self._pending.items() if p.file is file}
            if kept:
                new = _File(self._next_path(), len(kept))
                await self._run(_write_buffered, pa.concat_tables([p.table for p in kept.values()]), new.path)
                for pending in kept.values():
                    pending.file = new
            await self._run(_unlink, [file.path])

    async def load_buffered(self) -> Mapping[str, Scored]:
        """Groups that an earlier process left buffered, by prompt id. A file that is damaged is put aside."""
        found: dict[str, Scored] = {}
        for path in self._pending_files():
            try:
                tables = await self._run(_read_groups, path, SCHEMA)
                groups = {prompt_id: await self._run(decode, table) for prompt_id, table in tables.items()}
            except DataError as error:
                aside = path.with_suffix(".damaged")
                await self._run(path.rename, aside)
                logger.warning(
                    "passing over buffered groups, their prompts are sampled again: %s (kept as %s)", error, aside.name
                )
                continue
            file = _File(path, len(tables))
            for prompt_id, scored in groups.items():
                self._pending[prompt_id] = _Pending(tables[prompt_id], file)
                found[prompt_id] = Scored(group_info(scored.group, scored.rewards), await self._put(scored))
        return found

    async def responses(self, group: Handle) -> list[dict[str, Any]]:
        """What is kept of a scored group of an evaluation."""
        [scored] = await self._run(self._opened, [group])
        return responses_of(scored)

    async def evaluated(self, step: int, responses: Sequence[Mapping[str, Any]]) -> None:
        """Return when they are on disk, in place of those of an earlier evaluation at this step."""
        await self._run(write_evaluation, step_file(self.directory / FOLDER, step), step, responses)

    async def roll_back(self, version: int) -> None:
        """Take away the final files, and the evaluations, of what happened after the checkpoint of `version`."""
        written = [*self.directory.glob("*.parquet"), *(self.directory / FOLDER).glob("*.parquet")]
        files = [path for path in written if _is_after(path, version)]
        await self._run(_unlink, files)
        self._step = version

    async def samples(self, step: int, limit: int) -> Sequence[SampleRow]:
        """The first rollout of a few prompts, if `step` is the newest settled step: of those that it wrote down."""
        last, table = self._last
        if step != last or table is None or limit < 1:
            return []
        return await self._run(_samples, table, step, limit)

    async def close(self) -> None:
        """Write the groups that were dropped after the last step, and end the thread."""
        try:
            if self._writing is not None:
                await self._writing
            await self._close_file(self.directory / f"after-{self._step:06d}.parquet")
        finally:
            self._thread.shutdown(wait=True)

    async def _write_pending(self) -> None:
        """Write whatever has been finished, until there is no more."""
        while self._unwritten:
            if self._linger_s:
                await asyncio.sleep(self._linger_s)
            groups, self._unwritten = self._unwritten, []
            path = self._next_path()
            try:
                tables = await self._run(self._fetch_and_write, [group for group, _ in groups], path)
            except Exception as error:  # whatever it is, it belongs to those who wait for the file
                tables = [error] * len(groups)
            file = _File(path, sum(isinstance(table, pa.Table) for table in tables))
            for (_, written), table in zip(groups, tables, strict=True):
                if isinstance(table, pa.Table):
                    self._pending[table.column("prompt_id")[0].as_py()] = _Pending(table, file)
                if written.done():
                    continue
                if isinstance(table, Exception):
                    written.set_exception(table)
                else:
                    written.set_result(None)
        self._writing = None

    def _fetch_and_write(self, handles: Sequence[Handle], path: Path) -> list[pa.Table | HandleLost]:
        """One file of all groups; the rows of each, or why there are none."""
        found = self._fetch(handles)
        tables = iter(_encode_and_write([group for group in found if not isinstance(group, HandleLost)], path))
        return [group if isinstance(group, HandleLost) else next(tables) for group in found]

    def _opened(self, handles: Sequence[Handle]) -> Sequence[Any]:
        """Raises HandleLost."""
        found = self._fetch(handles)
        for value in found:
            if isinstance(value, HandleLost):
                raise value
        return found

    def _next_path(self) -> Path:
        return self._pending_dir / f"{next(self._numbers):09d}.parquet"

    def _pending_files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._pending_dir.glob("*.parquet"))

    async def _close_file(self, path: Path) -> pa.Table | None:
        """Move every group whose fate is known into `path`; returns its rows."""
        done = [self._pending.pop(prompt_id) for prompt_id, p in list(self._pending.items()) if p.fate is not None]
        if not done:
            return None
        empty = []
        for pending in done:
            pending.file.groups -= 1
            if not pending.file.groups:
                empty.append(pending.file.path)
        return await self._run(_write_final, done, path, empty)

    async def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def step_file(directory: Path, step: int) -> Path:
    """Where the groups trained at a step end up."""
    return directory / f"step-{step:06d}.parquet"


def read_settled(directory: Path, prompt_ids: Sequence[str], step: int) -> list[Settled]:
    """Groups settled at a step, in the given order, from the final files in the `directory` of a store.

    They are in the file of that step; those of a skipped step in the next one, or in none yet. Raises DataError when
    one of them is in no file, or a file cannot be read.
    """
    found: dict[str, pa.Table] = {}
    for path in _final_files(directory, step):
        if found.keys() >= set(prompt_ids):
            break
        found |= {i: table for i, table in _read_groups(path, FATE_SCHEMA).items() if i in prompt_ids}
    if missing := [i for i in prompt_ids if i not in found]:
        raise DataError(f"rollout store {directory}: {missing[0]} of step {step} is in no file there")
    tables = [found[prompt_id] for prompt_id in prompt_ids]
    return [Settled(decode(table.select(SCHEMA.names)), reference_of(table)) for table in tables]


def _final_files(directory: Path, step: int) -> list[Path]:
    """Those that may hold groups settled at a step: its own, or the later ones, of which the first is the likeliest."""
    own = step_file(directory, step)
    if own.is_file():
        return [own]
    return sorted(p for p in directory.glob("*.parquet") if _is_after(p, step) or p.name.startswith("after"))


def _is_after(path: Path, version: int) -> bool:
    kind, _, number = path.stem.partition("-")
    if not number.isdecimal():
        return False
    return (kind == "step" and int(number) > version) or (kind == "after" and int(number) >= version)


def _write_buffered(table: pa.Table, path: Path) -> None:
    write_rows(table, path, **_FAST)


def _encode_and_write(groups: Sequence[ScoredGroup], path: Path) -> list[pa.Table]:
    """One file of all groups; returns the rows of each."""
    if not groups:
        return []
    table = encode(groups)
    _write_buffered(table, path)
    starts = itertools.accumulate((len(group.rollouts) for group in groups), initial=0)
    return [table.slice(start, len(group.rollouts)) for start, group in zip(starts, groups, strict=False)]


def _read_groups(path: Path, schema: pa.Schema) -> dict[str, pa.Table]:
    """The rows of each prompt in a file."""
    table = read_rows(path, schema)
    ids = table.column("prompt_id").to_pylist()
    tables, start = {}, 0
    for prompt_id, rows in itertools.groupby(ids):
        n = len(list(rows))
        tables[prompt_id] = table.slice(start, n)
        start += n
    return tables


def _write_final(done: Sequence[_Pending], path: Path, empty: Sequence[Path]) -> pa.Table:
    table = with_fates([p.table for p in done], [(p.fate or "", p.step) for p in done], [p.reference for p in done])
    write_rows(table, path, synced=True, compression="zstd", use_dictionary=_DICTIONARY)
    _unlink(empty)
    return table


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _samples(table: pa.Table, step: int, limit: int) -> list[SampleRow]:
    columns = ["prompt_id", "sample", "prompt", "text", "answer", "score", "version_spans", "finish_reason"]
    rows = table.select([*columns, "fate", "components"]).to_pylist()
    first_rows = [row for row in rows if row["sample"] == 0]
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
            fate=row["fate"],
            components=json.loads(row["components"]),
        )
        for row in first_rows[::stride][:limit]
    ]
