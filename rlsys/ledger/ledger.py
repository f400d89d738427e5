"""The ledger: what became of every prompt, in SQLite (WAL), so that nothing is ever lost without a trace.

    prompts   one row per prompt: where it stands, and how it ended
    events    everything that happened to it, in order; `position` numbers them through the run
    facts     a few figures of the whole run by key, as JSON

    pending -> buffered -> trained          pending: drawn, being sampled or scored
       |          |                         buffered: complete and on disk, waiting for the learner
       +----------+------> dropped          trained, dropped: the two fates; a prompt has at most one

The only ways back are `unbuffered` (buffered -> pending) and `roll_back` (a fate later than a checkpoint is undone).
Both the class and triggers in the file itself refuse anything else.

Calls append to a queue and return in microseconds; a thread writes what has queued up in one transaction.

SQLite has no checksums. What is looked at when a ledger is opened: the structure of the file, every constraint and
index, that no event is missing, and that the fate of each prompt is the one that its events tell.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from rlsys.durable import disk_is_full, no_room, writing
from rlsys.errors import RlsysError, RunDirError
from rlsys.types import GroupInfo, Prompt

T = TypeVar("T")
State = Literal["pending", "buffered", "trained", "dropped"]

_LINGER_S = 0.05  # events of this long are written together

_SCHEMA = """
CREATE TABLE IF NOT EXISTS prompts (
    id TEXT PRIMARY KEY,
    idx INTEGER NOT NULL UNIQUE,
    choice TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'buffered', 'trained', 'dropped')),
    reason TEXT,
    step INTEGER,
    settled INTEGER,
    generator TEXT,
    min_version INTEGER,
    max_version INTEGER,
    lengths TEXT,
    scores TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    drawn_at REAL NOT NULL,
    ended_at REAL,
    CHECK ((state = 'trained') = (step IS NOT NULL)),
    CHECK ((state = 'dropped') = (reason IS NOT NULL)),
    CHECK ((state IN ('trained', 'dropped')) = (settled IS NOT NULL))
);
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    prompt_id TEXT,
    event TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS events_of_a_prompt ON events (prompt_id);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS one_fate BEFORE UPDATE ON prompts
WHEN OLD.state IN ('trained', 'dropped') AND NEW.state <> 'pending'
BEGIN SELECT RAISE(ABORT, 'a prompt has one fate'); END;
CREATE TRIGGER IF NOT EXISTS trained_from_the_buffer BEFORE UPDATE OF state ON prompts
WHEN NEW.state = 'trained' AND OLD.state <> 'buffered'
BEGIN SELECT RAISE(ABORT, 'only a buffered prompt can be trained'); END;
CREATE TRIGGER IF NOT EXISTS nothing_is_lost BEFORE DELETE ON prompts
BEGIN SELECT RAISE(ABORT, 'prompts are never deleted'); END;
"""

# Rows of what does not fit together.
_ODD = {
    "an event is missing": "SELECT count(*) FROM events HAVING count(*) <> coalesce(max(position), 0)",
    "the fate of a prompt is not the one that its events tell": """
        SELECT id FROM prompts LEFT JOIN events ON position = settled
        WHERE state IN ('trained', 'dropped') AND (
            prompt_id IS NOT id OR event IS NOT state
            OR json_extract(detail, '$.step') IS NOT step OR json_extract(detail, '$.reason') IS NOT reason
        )""",
}

_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?, ?)"
_DRAW = "INSERT INTO prompts (id, idx, choice, state, drawn_at) VALUES (?, ?, ?, 'pending', ?)"
_ASSIGN = "UPDATE prompts SET attempts = attempts + 1, generator = ? WHERE id = ?"
_BUFFER = """UPDATE prompts
             SET state = 'buffered', generator = ?, min_version = ?, max_version = ?, lengths = ?, scores = ?
             WHERE id = ?"""
_TRAIN = "UPDATE prompts SET state = 'trained', step = ?, settled = ?, ended_at = ? WHERE id = ?"
_DROP = "UPDATE prompts SET state = 'dropped', reason = ?, settled = ?, ended_at = ? WHERE id = ?"
_PEND = "UPDATE prompts SET state = 'pending', step = NULL, reason = NULL, settled = NULL, ended_at = NULL WHERE id = ?"
# The prompts (id, reason) of the batch of a step, in its order; the second is for a step that was skipped.
CONSUMED = (
    "SELECT id, reason FROM prompts WHERE state = 'trained' AND step = ? ORDER BY settled",
    """SELECT prompts.id, reason FROM prompts JOIN events ON events.position = prompts.settled
       WHERE prompts.state = 'dropped' AND prompts.reason LIKE 'step skipped:%'
             AND json_extract(events.detail, '$.version') = ? ORDER BY prompts.settled""",
)
_FACT = "INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A prompt without a fate."""

    id: str
    index: int
    choice: Mapping[str, Any]  # as it was given to `drawn`
    state: State


class Ledger:
    """The writing side; one process at a time. Raises RunDirError when another process has it open, or it is damaged.

    A failure to write is raised by the next call: DiskFullError or RlsysError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunDirError(
                f"{path.parent} is in use by another process: end it, or choose another run.dir"
            ) from None
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._lock.close()
            raise ledger_error(path, error, "opened") from error
        self._queue: list[tuple[str, tuple[Any, ...]]] = []
        self._mutex = threading.Lock()  # of the queue
        self._transaction = threading.Lock()  # of the connection: an event loop may run the writing itself
        self._hurry = threading.Event()
        self._scheduled: Future[None] | None = None
        self._failure: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    def _prepare(self) -> None:
        """Check what is in the file, and read what is to be known of it. Raises sqlite3.Error, UnicodeDecodeError."""
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.executescript(_SCHEMA)
        [(found,)] = self._connection.execute("PRAGMA integrity_check(1)")
        odd = [] if found == "ok" else [found]
        odd += [what for what, query in _ODD.items() if self._connection.execute(query).fetchone()]
        if odd:
            raise sqlite3.DatabaseError(odd[0])
        [(position,)] = self._connection.execute("SELECT coalesce(max(position), 0) FROM events")
        self._position = int(position)
        self._states: dict[str, State] = dict(
            self._connection.execute("SELECT id, state FROM prompts WHERE state IN ('pending', 'buffered')")
        )

    # ---- what happens to a prompt, in order ----

    def drawn(self, prompt: Prompt, choice: Mapping[str, Any] = MappingProxyType({})) -> None:
        """The prompt left the source; drawing a pending prompt again (after a resume) is an event of its own.

        `choice` is what is needed to draw it again, in JSON's types.
        """
        if self._states.get(prompt.id) == "pending":
            self._event(prompt.id, "drawn again", index=prompt.index)
            return
        self._expect(prompt.id, None)
        self._states[prompt.id] = "pending"
        self._add(_DRAW, prompt.id, prompt.index, json.dumps(dict(choice)), time.time())
        self._event(prompt.id, "drawn", index=prompt.index, task=prompt.task)

    def assigned(self, prompt_id: str, worker: str, attempt: int) -> None:
        """A generator was given the prompt."""
        self._expect(prompt_id, "pending")
        self._add(_ASSIGN, worker, prompt_id)
        self._event(prompt_id, "assigned", worker=worker, attempt=attempt)

    def failed(self, prompt_id: str, worker: str, cause: str) -> None:
        """A worker did not finish its work on the prompt, which goes elsewhere or is dropped."""
        self._event(prompt_id, "failed", worker=worker, cause=cause)

    def sampled(self, info: GroupInfo) -> None:
        self._expect(info.prompt_id, "pending")
        versions = [info.min_version, info.max_version]
        self._event(info.prompt_id, "sampled", worker=info.generator, versions=versions, lengths=info.lengths)

    def branched(self, prompt_id: str, branches: int, tokens: int) -> None:
        """A round of branches off the prompt's rollouts has been sampled."""
        self._event(prompt_id, "branched", branches=branches, tokens=tokens)

    def scored(self, info: GroupInfo, worker: str) -> None:
        self._expect(info.prompt_id, "pending")
        self._event(
            info.prompt_id, "scored", worker=worker, scores=_finite(info.scores), statuses=Counter(info.reward_statuses)
        )

    def buffered(self, info: GroupInfo) -> None:
        """The group is complete and on disk."""
        self._move(info.prompt_id, "pending", "buffered")
        self._add(
            _BUFFER,
            info.generator,
            info.min_version,
            info.max_version,
            json.dumps(info.lengths),
            json.dumps(_finite(info.scores)),
            info.prompt_id,
        )
        self._event(info.prompt_id, "buffered")

    def trained(self, prompt_ids: Iterable[str], step: int) -> None:
        """The learner made version `step` with these groups."""
        for prompt_id in prompt_ids:
            self._expect(prompt_id, "buffered")
            del self._states[prompt_id]
            position = self._event(prompt_id, "trained", step=step)
            self._add(_TRAIN, step, position, time.time(), prompt_id)

    def dropped(self, prompt_id: str, reason: str, version: int) -> None:
        """The prompt will not be trained on. Up to the first ":" the reason is its kind, the rest is detail."""
        if self._states.pop(prompt_id, None) is None:
            raise RlsysError(f"ledger {self.path}: {prompt_id} is dropped, but is not outstanding")
        position = self._event(prompt_id, "dropped", reason=reason, version=version)
        self._add(_DROP, reason, position, time.time(), prompt_id)

    def unbuffered(self, prompt_id: str, event: str) -> None:
        """A group that an earlier process left buffered: `event` says what becomes of it."""
        self._move(prompt_id, "buffered", "pending")
        self._add(_PEND, prompt_id)
        self._event(prompt_id, event)

    def note(self, event: str, **detail: Any) -> None:
        """Something that happened to the run, not to one prompt."""
        self._event(None, event, **detail)

    def remember(self, key: str, value: Any) -> None:
        """Keep a figure of the whole run; a later value replaces it."""
        self._add(_FACT, key, json.dumps(value))

    # ---- reading; these wait for the queue to be written ----

    @property
    def position(self) -> int:
        """Number of the newest event."""
        return self._position

    async def flush(self) -> None:
        """Return when everything so far is in the file itself, and on the disk: it outlives the loss of the WAL."""
        self._check()
        self._hurry.set()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._write_through)
        self._check()

    def recall(self, key: str) -> Any:
        """What was remembered under the key; None when nothing was."""
        rows = self._read("SELECT value FROM facts WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else None

    def fates(self) -> dict[str, Any]:
        """`{"trained": 640, "dropped": {"zero variance": 3}, "pending": 64}`; pending counts buffered ones too."""
        rows = self._read("SELECT state, reason, count(*) FROM prompts GROUP BY state, reason")
        return count_fates(rows)

    def outstanding(self) -> list[Outstanding]:
        """Prompts without a fate, in order of index."""
        rows = self._read(
            "SELECT id, idx, choice, state FROM prompts WHERE state IN ('pending', 'buffered') ORDER BY idx"
        )
        return [Outstanding(id_, index, json.loads(choice), state) for id_, index, choice, state in rows]

    def fate_of(self, prompt_ids: Iterable[str]) -> dict[str, tuple[State, str | None, int | None]]:
        """(state, reason, step) of each of the prompts that the ledger knows."""
        query = "SELECT state, reason, step FROM prompts WHERE id = ?"
        return {prompt_id: rows[0] for prompt_id in prompt_ids if (rows := self._read(query, prompt_id))}

    def consumed(self, step: int) -> list[str]:
        """The prompts of the batch that made version `step`, in its order; a step that was skipped has its own, too."""
        rows = next((rows for query in CONSUMED if (rows := self._read(query, step))), [])
        return [prompt_id for prompt_id, _ in rows]

    def next_index(self) -> int:
        """The index after the highest one that was ever drawn."""
        return int(self._read("SELECT coalesce(max(idx), -1) + 1 FROM prompts")[0][0])

    def roll_back(self, position: int) -> int:
        """Undo the fates after an event: those prompts are pending again. Returns how many.

        Raises RunDirError when the ledger ends before `position`: it is not the one the checkpoint was made with.
        """
        self._sync()
        if position > self._position:
            raise RunDirError(
                f"ledger {self.path} ends at event {self._position}, but the checkpoint was made at event {position}: "
                "the ledger of this run was replaced or is damaged; restore it, or start in another run.dir"
            )
        rows = self._read("SELECT id FROM prompts WHERE settled > ? ORDER BY idx", position)
        for (prompt_id,) in rows:
            self._states[prompt_id] = "pending"
            self._add(_PEND, prompt_id)
            self._event(prompt_id, "rolled back", position=position)
        self._sync()
        return len(rows)

    def close(self) -> None:
        """Write everything and let go of the file."""
        try:
            self._sync()
        finally:
            self._thread.shutdown(wait=True)
            self._connection.close()
            self._lock.close()

    # ---- the queue ----

    def _expect(self, prompt_id: str, state: State | None) -> None:
        have = self._states.get(prompt_id)
        if have != state:
            raise RlsysError(
                f"ledger {self.path}: {prompt_id} is {have or 'not outstanding'}, expected {state or 'a new prompt'}"
            )

    def _move(self, prompt_id: str, old: State, new: State) -> None:
        self._expect(prompt_id, old)
        self._states[prompt_id] = new

    def _event(self, prompt_id: str | None, event: str, **detail: Any) -> int:
        self._position += 1
        self._add(_EVENT, self._position, time.time(), prompt_id, event, json.dumps(detail))
        return self._position

    def _add(self, statement: str, *values: Any) -> None:
        self._check()
        with self._mutex:
            self._queue.append((statement, values))
            if self._scheduled is None:
                self._scheduled = self._thread.submit(self._write_soon)

    def _write_soon(self) -> None:
        self._hurry.wait(_LINGER_S)
        self._hurry.clear()
        self._write()

    def _write(self) -> None:
        with self._transaction:
            self._write_queue()

    def _write_through(self) -> None:
        with self._transaction:
            self._write_queue()
            try:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            except sqlite3.Error as error:
                self._failure = self._failure or error

    def _write_queue(self) -> None:
        with self._mutex:
            queue, self._queue = self._queue, []
            self._scheduled = None
        if not queue or self._failure is not None:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            # Order matters within one prompt only, but a stable grouping of neighbours keeps all of it.
            for statement, rows in groupby(queue, key=lambda item: item[0]):
                self._connection.executemany(statement, [values for _, values in rows])
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._failure = error
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _check(self) -> None:
        if self._failure is not None:
            raise ledger_error(self.path, self._failure, "written") from self._failure

    def _sync(self) -> None:
        self._hurry.set()
        self._thread.submit(self._write).result()
        self._check()

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        self._sync()
        try:
            with self._transaction:
                return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise ledger_error(self.path, error, "read") from error


def ledger_error(path: Path, error: BaseException, done: str) -> RlsysError:
    """What an error of SQLite's means for the run; `done` is what could not be: "opened", "read", "written"."""
    if disk_is_full(error):
        return no_room(path, error)
    # Python's own errors, of text that is none, have no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
        what = " ".join(str(error).removeprefix("*** in database main ***").split())
        return RunDirError(
            f"ledger {path} is damaged ({what}): put a copy of it back, or begin anew in another run.dir; `rlsys "
            f"export {path.parent} DIR` gives the model of its newest checkpoint"
        )
    return RlsysError(f"ledger {path} could not be {done}: {error}")


def count_fates(rows: Sequence[tuple[State, str | None, int]]) -> dict[str, Any]:
    """Rows (state, reason, count) as trained / dropped by kind of reason / pending."""
    trained = sum(count for state, _, count in rows if state == "trained")
    pending = sum(count for state, _, count in rows if state in ("pending", "buffered"))
    dropped: Counter[str] = Counter()
    for state, reason, count in rows:
        if state == "dropped":
            dropped[(reason or "").partition(":")[0]] += count
    return {"trained": trained, "dropped": dict(dropped), "pending": pending}


def _finite(values: Sequence[float]) -> list[float | None]:
    """NaN is not JSON: unscored becomes null."""
    return [value if value == value else None for value in values]
