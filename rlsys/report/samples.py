"""A few responses of a run for people to read: out of all of them, those that say most."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from rlsys.errors import RlsysError
from rlsys.ledger.codec import FATE_SCHEMA, read_rows
from rlsys.ledger.story import ROLLOUTS_DIR, steps_with_failed_rewards

T = TypeVar("T")

MOST_FILES = 200  # of each run; one file is one step
MOST_OF_A_KIND = 40
MOST_CHARACTERS = 6000  # of a prompt or a response; the middle of a longer one is left out

# What they are chosen by, and what people see.
KINDS: Mapping[str, str] = {
    "best": "Best",
    "worst": "Worst",
    "failed": "Reward failed",
    "cut": "Cut at the limit",
    "dropped": "Dropped",
    "typical": "Any",
}
_LIGHT = ("prompt_id", "sample", "finish_reason", "origin", "reward_status", "score", "fate", "step")
_SHOWN = (
    *("prompt_id", "sample", "prompt", "answer", "text", "token_ids", "version_spans", "finish_reason", "segments"),
    *("origin", "reward_status", "score", "components", "reward_detail", "fate", "step"),
)


class Piece(NamedTuple):
    """The text of a segment, and the difference of the values at its ends; None where one of them is not known."""

    text: str
    change: float | None


@dataclass(frozen=True, slots=True)
class Response:
    """`versions` says which weights sampled which tokens: `48[0:7]`. `score` is None where `status` is not "ok"."""

    text: str
    tokens: int
    versions: str
    finish: str
    status: str
    detail: str
    score: float | None
    components: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sample(Response):
    """A response of the rollout store. `pieces` is empty without segments.

    `group` are the scores of all rollouts of its prompt, in order (None: unscored), its own at `place`.
    """

    step: int
    prompt_id: str
    number: int
    prompt: str
    answer: str | None
    pieces: Sequence[Piece]
    origin: str
    group: Sequence[float | None]
    place: int
    fate: str


@dataclass(frozen=True, slots=True)
class Samples:
    """`shown` has each sample once; `kinds` the places there of each kind, the most telling first.

    `read` of `files` final files of the rollout store were looked at.
    """

    shown: Sequence[Sample] = ()
    kinds: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict.fromkeys(KINDS, ()))
    read: int = 0
    files: int = 0


class _Rows(NamedTuple):
    """Rollouts of all files that were read, one element each."""

    file: np.ndarray  # int
    row: np.ndarray  # int, in its file
    step: np.ndarray  # int
    tie: np.ndarray  # int, an arbitrary order that is always the same
    score: np.ndarray  # float, NaN where unscored
    group_mean: np.ndarray  # float, of the scored rollouts of its prompt; NaN where there is none
    scored: np.ndarray  # bool
    own: np.ndarray  # bool, sampled by the policy
    cut: np.ndarray  # bool
    dropped: np.ndarray  # bool


def read_samples(run_dir: Path, problems: list[str]) -> Samples:
    """Choose and read them; what cannot be read is told in `problems`."""
    files = sorted((run_dir / ROLLOUTS_DIR).glob("*.parquet"))
    chosen = spread(files, MOST_FILES)
    if len(chosen) < len(files):
        chosen = sorted({*chosen, *_with_failures(run_dir, files)})
    damaged: list[str] = []
    paths, tables = [], []
    for path in chosen:
        with noting(damaged):
            tables.append(read_rows(path, FATE_SCHEMA, _LIGHT))
            paths.append(path)
    kinds = _choose(_rows(tables)) if any(table.num_rows for table in tables) else {}
    wanted: dict[int, set[int]] = {}
    for places in kinds.values():
        for file, row in places:
            wanted.setdefault(file, set()).add(row)
    decode = _decoder(run_dir, problems)
    shown: list[Sample] = []
    where: dict[tuple[int, int], int] = {}
    for file in sorted(wanted):
        with noting(damaged):
            rows = sorted(wanted[file])
            table = read_rows(paths[file], FATE_SCHEMA, _SHOWN).take(pa.array(rows))
            found = [_sample(row, decode, tables[file]) for row in table.to_pylist()]
            where |= {(file, row): len(shown) + i for i, row in enumerate(rows)}
            shown += found
    problems += told(damaged, "its rollouts are left out")
    placed = {kind: [where[p] for p in kinds.get(kind, ()) if p in where] for kind in KINDS}
    return Samples(shown, placed, len(paths), len(files))


def told(damaged: Sequence[str], what: str) -> list[str]:
    """The first few messages, with `what` becomes of the file of each."""
    more = f" (and {len(damaged) - 3} more)" if len(damaged) > 3 else ""
    return [f"{message}; {what}{more}" for message in damaged[:3]]


@contextmanager
def noting(messages: list[str]) -> Iterator[None]:
    """A file that cannot be read is noted, and the others are read."""
    try:
        yield
    except RlsysError as error:
        messages.append(str(error))


def spread(items: Sequence[T], most: int) -> list[T]:
    """The first, the last, and others evenly between them."""
    if len(items) <= most or most < 2:
        return list(items[: max(0, most)])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _with_failures(run_dir: Path, files: Sequence[Path]) -> list[Path]:
    """The files that have prompts with failed rewards: those are rare, and worth a look."""
    try:
        steps = steps_with_failed_rewards(run_dir, MOST_OF_A_KIND)
    except RlsysError:  # the ledger is told of elsewhere
        return []
    names = {f"step-{step:06d}.parquet" for step in steps}
    return [path for path in files if path.name in names]


def _rows(tables: Sequence[pa.Table]) -> _Rows:
    columns: list[list[np.ndarray]] = [[] for _ in _Rows._fields]
    for number, table in enumerate(tables):
        n = table.num_rows
        if not n:  # an empty column has no type
            continue
        ids = table.column("prompt_id").to_pylist()
        samples = table.column("sample").to_pylist()
        statuses = np.array(table.column("reward_status").to_pylist())
        scores = table.column("score").to_numpy().astype(float)
        scored = (statuses == "ok") & np.isfinite(scores)
        group = np.unique(ids, return_inverse=True)[1]
        counts = np.bincount(group, scored)
        sums = np.bincount(group, np.where(scored, scores, 0.0))
        means = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
        fates = table.column("fate").to_pylist()
        found = (
            np.full(n, number),
            np.arange(n),
            table.column("step").to_numpy(),
            np.array([zlib.crc32(f"{i}#{s}".encode()) for i, s in zip(ids, samples, strict=True)]),
            scores,
            means[group],
            scored,
            np.array(table.column("origin").to_pylist()) == "policy",
            np.array(table.column("finish_reason").to_pylist()) == "length",
            np.array([fate.startswith("dropped") for fate in fates]),
        )
        for column, values in zip(columns, found, strict=True):
            column.append(values)
    return _Rows(*(np.concatenate(column) if column else np.zeros(0) for column in columns))


def _choose(rows: _Rows) -> dict[str, list[tuple[int, int]]]:
    """Of each kind the (file, row) of the first few.

    The best have the highest scores: first those whose group did worst, since a rare success says more than one of
    many. The worst the other way round.
    """

    def first(which: np.ndarray, *keys: np.ndarray) -> list[tuple[int, int]]:
        places = np.flatnonzero(which)
        order = np.lexsort([key[places] for key in reversed((*keys, rows.tie))])
        return [(int(rows.file[i]), int(rows.row[i])) for i in places[order][:MOST_OF_A_KIND]]

    rated = rows.scored & rows.own
    chosen = {
        "best": first(rated, -rows.score, rows.group_mean),
        "worst": first(rated, rows.score, -rows.group_mean),
        "failed": first(~rows.scored),
        "cut": first(rows.cut),
        "dropped": first(rows.dropped),
        "typical": first(rows.own),
    }
    step = {(int(f), int(r)): int(s) for f, r, s in zip(rows.file, rows.row, rows.step, strict=True)}
    for kind in ("failed", "cut", "dropped", "typical"):
        chosen[kind].sort(key=lambda place: (step[place], place))
    return chosen


def _sample(row: Mapping[str, Any], decode: Callable[[list[int]], str] | None, light: pa.Table) -> Sample:
    columns = [light.column(name).to_pylist() for name in ("prompt_id", "sample", "score", "reward_status")]
    group: list[float | None] = []
    place = 0
    for prompt_id, number, score, status in zip(*columns, strict=True):
        if prompt_id == row["prompt_id"]:
            place = len(group) if number == row["sample"] else place
            group.append(score if status == "ok" and score == score else None)
    return Sample(
        **response_fields(row, len(row["token_ids"])),
        step=row["step"],
        prompt_id=row["prompt_id"],
        number=row["sample"],
        prompt=shorten(row["prompt"]),
        answer=None if row["answer"] is None else shorten(row["answer"]),
        pieces=_pieces(row["token_ids"], row["segments"], decode) if row["segments"] else (),
        origin=row["origin"],
        group=group,
        place=place,
        fate=row["fate"],
    )


def response_fields(row: Mapping[str, Any], tokens: int, most: int = MOST_CHARACTERS) -> dict[str, Any]:
    """Those of `Response`, of a row of the rollout store or of an evaluation; `most` characters of its text."""
    scored = row["reward_status"] == "ok" and math.isfinite(row["score"])
    try:
        components = {str(name): float(value) for name, value in json.loads(row["components"]).items()}
    except (ValueError, TypeError, AttributeError):
        components = {}
    return {
        "text": shorten(row["text"], most),
        "tokens": tokens,
        "versions": " ".join(f"{s['version']}[{s['start']}:{s['end']}]" for s in row["version_spans"]),
        "finish": row["finish_reason"],
        "status": row["reward_status"],
        "detail": shorten(row["reward_detail"] or "", 1000),
        "score": row["score"] if scored else None,
        "components": {name: value for name, value in components.items() if math.isfinite(value)},
    }


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """With the middle left out where it is too long: what a response comes to is at its end."""
    if len(text) <= most:
        return text
    head = most // 3
    return f"{text[:head]}\n[... {len(text) - most:,} characters left out ...]\n{text[head - most :]}"


def _pieces(
    ids: list[int], segments: Sequence[Mapping[str, Any]], decode: Callable[[list[int]], str] | None
) -> list[Piece]:
    """The text of each segment, and of what is between them.

    What is decoded are beginnings of the response, since a token alone may be half a letter.
    """
    whole = "" if decode is None else decode(ids)
    most = max(80, MOST_CHARACTERS // len(segments))
    pieces = []

    def add(start: int, end: int, change: float | None) -> None:
        if decode is None:
            pieces.append(Piece(f"[{end - start} tokens] ", change))
        else:
            text = whole[len(decode(ids[:start])) : len(decode(ids[:end]))]
            pieces.append(Piece(shorten(text, most), change))

    place = 0
    for segment in segments:
        if segment["start"] > place:
            add(place, segment["start"], None)
        values = segment["start_value"], segment["end_value"]
        add(segment["start"], segment["end"], None if None in values else values[1] - values[0])
        place = segment["end"]
    if place < len(ids):
        add(place, len(ids), None)
    return pieces


def _decoder(run_dir: Path, problems: list[str]) -> Callable[[list[int]], str] | None:
    """By the tokenizer of the newest checkpoint; None where there is none."""
    files = sorted(run_dir.glob("checkpoints/step-*/learner/hf/tokenizer.json"))
    if not files:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(files[-1]))
    except Exception as error:  # its Rust raises bare ones
        problems.append(f"{files[-1]} cannot be read ({error}): segments are shown without their text")
        return None
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
