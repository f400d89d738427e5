"""Reading a run back, while it runs or afterwards: what `rlsys inspect` shows and `rlsys replay` repeats."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from rlsys.errors import DataError, RunDirError
from rlsys.ledger.codec import FATE_SCHEMA, SCHEMA, read_rows
from rlsys.ledger.evaluations import EVALUATION_SCHEMA, FOLDER
from rlsys.ledger.ledger import CONSUMED, count_fates, ledger_error

LEDGER_FILE = "ledger.sqlite"
ROLLOUTS_DIR = "rollouts"

ROUTINE = ("worker joined", "worker left", "checkpoint")  # what happens to every run, and is no incident

_JSON_COLUMNS = ("lengths", "scores")
_SHOWN = (
    "prompt", "answer", "sample", "text", "finish_reason", "score", "reward_status", "reward_detail", "version_spans",
    "components", "token_ids", "segments")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """`at` is seconds since 1970. `detail` depends on the event: worker, versions, scores, reason, step, ..."""

    position: int
    at: float
    event: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PromptStory:
    """Everything that is known of one prompt.

    `prompt` is its row of the ledger: id, idx, state, reason, step, generator, min_version, max_version, lengths,
    scores, attempts, drawn_at, ended_at. `rollouts` are its rows of the rollout store, empty until it is scored.
    """

    prompt: dict[str, Any]
    events: list[Event]
    rollouts: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class RunStory:
    """`facts` holds what the run remembered (evaluations and so on), `notes` the events that concern no single prompt.

    `steps` has one row per trained step: step, prompts, oldest and newest version, mean score.
    """

    fates: dict[str, Any]
    facts: dict[str, Any]
    notes: list[Event]
    steps: list[dict[str, Any]]
    first_prompts: list[str]
    prompts: int


@dataclass(frozen=True, slots=True)
class Consumed:
    """The prompts of a step's batch, in its order, and why the step was skipped, if it was."""

    prompt_ids: list[str]
    skipped: str | None


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt got from one place to the next: drawn, assigned, sampled, branched, scored, buffered, trained, dropped.

    `at` is seconds since 1970; `worker` did it, "" where no worker has a part in it.
    """

    at: float
    prompt_id: str
    event: str
    worker: str


@contextmanager
def _open(run_dir: Path) -> Iterator[sqlite3.Connection]:
    path = run_dir / LEDGER_FILE
    if not path.is_file():
        raise RunDirError(f"{run_dir} is no run directory: it has no {LEDGER_FILE}")
    # Without a WAL nobody has it open: then it is read as it lies there, and nothing is left beside it.
    still = "" if path.with_name(f"{LEDGER_FILE}-wal").exists() else "&immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{still}", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            yield connection
    except sqlite3.Error as error:
        raise ledger_error(path, error, "read") from error


def _events(rows: sqlite3.Cursor) -> list[Event]:
    return [Event(row["position"], row["at"], row["event"], json.loads(row["detail"])) for row in rows]


def read_run(run_dir: Path) -> RunStory:
    """The whole run in figures. Raises RunDirError when it is no run directory."""
    with _open(run_dir) as db:
        counts = [
            tuple(row) for row in db.execute("SELECT state, reason, count(*) FROM prompts GROUP BY state, reason")
        ]
        steps = [
            {
                "step": row["step"],
                "prompts": row["prompts"],
                "min_version": row["oldest"],
                "max_version": row["newest"],
                "score_mean": row["score_mean"],
            }
            for row in db.execute(
                """SELECT step, count(DISTINCT prompts.id) AS prompts, min(min_version) AS oldest,
                          max(max_version) AS newest, avg(scores.value) AS score_mean
                   FROM prompts LEFT JOIN json_each(prompts.scores) AS scores
                   WHERE step IS NOT NULL GROUP BY step ORDER BY step"""
            )
        ]
        return RunStory(
            fates=count_fates(counts),
            facts={row["key"]: json.loads(row["value"]) for row in db.execute("SELECT * FROM facts ORDER BY key")},
            notes=_events(db.execute("SELECT * FROM events WHERE prompt_id IS NULL ORDER BY position")),
            steps=steps,
            first_prompts=[row["id"] for row in db.execute("SELECT id FROM prompts ORDER BY idx LIMIT 5")],
            prompts=sum(count for _, _, count in counts),
        )


def read_incidents(run_dir: Path, most: int) -> list[Event]:
    """The newest notes that are no routine, the newest first. Raises RunDirError, as `read_run` does."""
    marks = ", ".join("?" * len(ROUTINE))
    with _open(run_dir) as db:
        query = (
            f"SELECT * FROM events WHERE prompt_id IS NULL AND event NOT IN ({marks}) ORDER BY position DESC LIMIT ?"
        )
        return _events(db.execute(query, (*ROUTINE, most)))


def read_passages(run_dir: Path, first: int, last: int) -> list[Passage]:
    """All that happened to any prompt while those of the steps `first` to `last` were on their way, in order.

    Raises RunDirError, as `read_run` does.
    """
    with _open(run_dir) as db:
        [(begin, end)] = db.execute(
            """SELECT min(events.position), max(settled) FROM prompts JOIN events ON prompts.id = events.prompt_id
               WHERE step BETWEEN ? AND ?""",
            (first, last),
        )
        rows = db.execute(
            """SELECT at, prompt_id, event, coalesce(json_extract(detail, '$.worker'), '') AS worker FROM events
               WHERE position BETWEEN ? AND ? AND prompt_id IS NOT NULL ORDER BY position""",
            (begin, end),
        )
        return [Passage(*row) for row in rows]


def read_lengths(run_dir: Path) -> dict[int, dict[int, int]]:
    """Of each step how many of its responses have which length, in tokens. Raises RunDirError, as `read_run` does."""
    found: dict[int, dict[int, int]] = {}
    with _open(run_dir) as db:
        for step, length, count in db.execute(
            """SELECT step, lengths.value, count(*) FROM prompts, json_each(prompts.lengths) AS lengths
               WHERE step IS NOT NULL GROUP BY step, lengths.value ORDER BY step, lengths.value"""
        ):
            found.setdefault(step, {})[length] = count
    return found


def steps_with_failed_rewards(run_dir: Path, most: int) -> list[int]:
    """The first steps that trained on a prompt of which a reward timed out or failed. Raises RunDirError."""
    with _open(run_dir) as db:
        rows = db.execute(
            """SELECT DISTINCT step FROM events JOIN prompts ON prompts.id = events.prompt_id
               WHERE event = 'scored' AND step IS NOT NULL
                     AND coalesce(json_extract(detail, '$.statuses.timeout'), json_extract(detail, '$.statuses.error'))
               ORDER BY step LIMIT ?""",
            (most,),
        )
        return [step for (step,) in rows]


def read_consumed(run_dir: Path, steps: Iterable[int]) -> dict[int, Consumed]:
    """The batch of each of the steps. Raises RunDirError when it is no run directory, DataError for an unknown step."""
    found: dict[int, Consumed] = {}
    with _open(run_dir) as db:
        for step in steps:
            rows = next((rows for query in CONSUMED if (rows := db.execute(query, (step,)).fetchall())), [])
            if not rows:
                raise DataError(f"{run_dir / LEDGER_FILE} has no batch of step {step}")
            reason = rows[0]["reason"]
            skipped = None if reason is None else reason.partition(": ")[2]
            found[step] = Consumed([row["id"] for row in rows], skipped)
    return found


def read_story(run_dir: Path, prompt_id: str) -> PromptStory:
    """The story of one prompt. Raises DataError, with near ids, when the run never drew it."""
    with _open(run_dir) as db:
        row = db.execute("SELECT * FROM prompts WHERE id = ?", (prompt_id,)).fetchone()
        if row is None:
            some = [r["id"] for r in db.execute("SELECT id FROM prompts ORDER BY idx LIMIT 3")]
            raise DataError(f"prompt {prompt_id!r} was never drawn in {run_dir}; its prompts are such as {some}")
        prompt = dict(row)
        events = _events(db.execute("SELECT * FROM events WHERE prompt_id = ? ORDER BY position", (prompt_id,)))
    for column in _JSON_COLUMNS:
        prompt[column] = json.loads(prompt[column]) if prompt[column] else []
    return PromptStory(prompt, events, _rollouts(run_dir / ROLLOUTS_DIR, prompt))


def was_drawn(run_dir: Path, prompt_id: str) -> bool:
    """Whether it is a prompt of training. Raises RunDirError, as `read_run` does."""
    with _open(run_dir) as db:
        return db.execute("SELECT 1 FROM prompts WHERE id = ?", (prompt_id,)).fetchone() is not None


def evaluation_files(run_dir: Path) -> dict[int, Path]:
    """The files with the responses of evaluations, by step, in rising order."""
    files = (run_dir / ROLLOUTS_DIR / FOLDER).glob("step-*.parquet")
    found = ((path.stem.partition("-")[2], path) for path in files)
    return dict(sorted((int(step), path) for step, path in found if step.isdecimal()))


def read_responses(run_dir: Path, prompt_id: str) -> list[dict[str, Any]]:
    """The responses to a held-out prompt, one row each, in order of the evaluations; none where none are kept.

    Raises DataError for a file that is damaged.
    """
    rows: list[dict[str, Any]] = []
    for path in evaluation_files(run_dir).values():
        table = read_rows(path, EVALUATION_SCHEMA)
        rows += table.filter(pc.equal(table.column("prompt_id"), prompt_id)).to_pylist()
    return rows


def _rollouts(directory: Path, prompt: dict[str, Any]) -> list[dict[str, Any]]:
    if prompt["step"] is not None:
        files = [directory / f"step-{prompt['step']:06d}.parquet"]
    else:
        files = [*sorted((directory / "pending").glob("*.parquet"), reverse=True), *sorted(directory.glob("*.parquet"))]
    for path in files:
        if path.is_file():
            table = read_rows(path, FATE_SCHEMA if path.parent == directory else SCHEMA)
            table = table.filter(pc.equal(table.column("prompt_id"), prompt["id"]))
            if table.num_rows:
                return list(table.select(list(_SHOWN)).to_pylist())
    return []
