"""What held-out prompts were answered at one evaluation after the other, and where that changed most."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlsys.ledger.codec import read_rows
from rlsys.ledger.evaluations import EVALUATION_SCHEMA
from rlsys.ledger.story import evaluation_files
from rlsys.report.samples import MOST_FILES, Response, noting, response_fields, shorten, spread, told

MOST_PROMPTS = 30  # of a kind
MOST_EVALUATIONS = 6  # of a prompt, with their responses; of the others the score alone is shown
MOST_RESPONSES = 3  # of a prompt at one evaluation
MOST_CHARACTERS = 24_000  # of all responses to a prompt

# What prompts are chosen by, and what people see.
KINDS: Mapping[str, str] = {
    "changed": "Most changed",
    "learned": "Learned",
    "forgotten": "Forgotten",
    "held_out": "Any held-out",
}
_LIGHT = ("prompt_id", "reward_status", "score")
_SHOWN = (
    *("prompt_id", "prompt", "answer", "text", "tokens", "version_spans", "finish_reason"),
    *("reward_status", "score", "components", "reward_detail"),
)


class Change(NamedTuple):
    """From the evaluation at step `before` to the one at step `after` the mean score changed by so much."""

    before: int
    after: int
    by: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A prompt at the evaluation at `step`: the mean score of its `count` responses (None: none was scored).

    `responses` are the first few of them, none where only the score is shown.
    """

    step: int
    score: float | None
    count: int
    responses: Sequence[Response]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prompt; `rise` and `fall` are the largest from an evaluation to any later one, None where there is none."""

    prompt_id: str
    prompt: str
    answer: str | None
    evaluations: Sequence[Evaluation]  # in which it took part, in order
    rise: Change | None
    fall: Change | None


@dataclass(frozen=True, slots=True)
class Evaluations:
    """`shown` has each prompt once; `kinds` the places there of each kind, the most telling first.

    `read` of `files` evaluations were looked at.
    """

    shown: Sequence[HeldOut] = ()
    kinds: Mapping[str, Sequence[int]] = field(default_factory=lambda: dict.fromkeys(KINDS, ()))
    read: int = 0
    files: int = 0


class Scores(NamedTuple):
    """Of P prompts at E evaluations."""

    ids: Sequence[str]  # [P]
    counts_PE: np.ndarray  # int, responses
    means_PE: np.ndarray  # float, of the scored ones; NaN where there is none


class Rises(NamedTuple):
    """Of each prompt the largest rise, and the places of the two evaluations that it is between."""

    by_P: np.ndarray  # float, 0 where there is no rise
    before_P: np.ndarray  # int
    after_P: np.ndarray  # int


def read_evaluations(run_dir: Path, problems: list[str]) -> Evaluations:
    """Choose prompts and read their responses; what cannot be read is told in `problems`."""
    files = evaluation_files(run_dir)
    damaged: list[str] = []
    tables: dict[int, pa.Table] = {}
    for step in spread(list(files), MOST_FILES):
        with noting(damaged):
            tables[step] = read_rows(files[step], EVALUATION_SCHEMA, _LIGHT)
    steps = list(tables)
    scores = mean_scores(list(tables.values()))
    rises, falls = largest_rises(scores.means_PE), largest_rises(-scores.means_PE)
    kinds = _choose(scores, rises, falls)
    chosen = dict.fromkeys(prompt for prompts in kinds.values() for prompt in prompts)
    wanted = {prompt: _places(scores, prompt, rises, falls) for prompt in chosen}
    rows = _rows([files[step] for step in steps], scores.ids, wanted, damaged)
    shown: list[HeldOut] = []
    where: dict[int, int] = {}
    for prompt in chosen:
        if prompt in rows:  # not in a file that has become unreadable
            where[prompt] = len(shown)
            changes = (_change(rises, prompt, steps), _change(falls, prompt, steps, sign=-1))
            shown.append(_held_out(scores, prompt, steps, rows[prompt], *changes))
    problems += told(damaged, "the responses of that evaluation are left out")
    placed = {kind: [where[prompt] for prompt in kinds[kind] if prompt in where] for kind in KINDS}
    return Evaluations(shown, placed, len(steps), len(files))


def mean_scores(tables: Sequence[pa.Table]) -> Scores:
    """Of one table an evaluation, with the columns prompt_id, reward_status and score."""
    empty = EVALUATION_SCHEMA.empty_table().select(list(_LIGHT))
    whole = pa.concat_tables([empty, *(table.replace_schema_metadata() for table in tables)])
    encoded = whole.column("prompt_id").combine_chunks().dictionary_encode()
    ids = encoded.dictionary.to_pylist()
    evaluation = np.repeat(np.arange(len(tables)), np.array([table.num_rows for table in tables], int))
    cell = encoded.indices.to_numpy().astype(np.int64) * len(tables) + evaluation
    score = whole.column("score").to_numpy()
    scored = pc.equal(whole.column("reward_status"), "ok").to_numpy() & np.isfinite(score)
    shape = len(ids), len(tables)
    counts, rated, sums = (
        np.bincount(cell, weights, shape[0] * shape[1]).reshape(shape)
        for weights in (None, scored, np.where(scored, score, 0.0))
    )
    return Scores(ids, counts, np.divide(sums, rated, out=np.full(shape, np.nan), where=rated > 0))


def largest_rises(means_PE: np.ndarray) -> Rises:
    """From an evaluation to any later one; of equal ones the earliest. NaN takes no part."""
    prompts, evaluations = means_PE.shape
    none = np.zeros(prompts, int)
    if evaluations < 2:
        return Rises(np.zeros(prompts), none, none)
    unknown = np.isnan(means_PE)
    before_PE = np.where(unknown, np.inf, means_PE)
    lowest_PE = np.minimum.accumulate(before_PE, axis=1)[:, :-1]  # until the evaluation before
    gains_PE = np.where(unknown, -np.inf, means_PE)[:, 1:] - lowest_PE
    after_P = gains_PE.argmax(axis=1)
    rows = np.arange(prompts)
    before_P = (before_PE == lowest_PE[rows, after_P][:, None]).argmax(axis=1)
    return Rises(np.maximum(gains_PE[rows, after_P], 0.0), before_P, after_P + 1)


def _choose(scores: Scores, rises: Rises, falls: Rises) -> dict[str, list[int]]:
    """Of each kind the first few prompts; of those that changed alike, those first that stayed changed to the end."""
    tie = np.array([zlib.crc32(prompt_id.encode()) for prompt_id in scores.ids])
    net = np.array([_net(means) for means in scores.means_PE])

    def first(which: np.ndarray, *keys: np.ndarray) -> list[int]:
        places = np.flatnonzero(which)
        order = np.lexsort([key[places] for key in reversed((*keys, tie))])
        return [int(place) for place in places[order][:MOST_PROMPTS]]

    most = np.maximum(rises.by_P, falls.by_P)
    return {
        "changed": first(most > 0, -most, -np.abs(net)),
        "learned": first(rises.by_P > 0, -rises.by_P, -net),
        "forgotten": first(falls.by_P > 0, -falls.by_P, net),
        "held_out": first(most >= 0),
    }


def _net(means_E: np.ndarray) -> float:
    """From the first evaluation to the last; 0 where it was never scored."""
    known = means_E[~np.isnan(means_E)]
    return float(known[-1] - known[0]) if len(known) else 0.0


def _places(scores: Scores, prompt: int, rises: Rises, falls: Rises) -> list[int]:
    """The evaluations whose responses are shown: the first, the last, those that differ most, and some between."""
    asked = [int(place) for place in np.flatnonzero(scores.counts_PE[prompt])]
    ends = {asked[0], asked[-1]}
    for change in (rises, falls):
        if change.by_P[prompt] > 0:
            ends |= {int(change.before_P[prompt]), int(change.after_P[prompt])}
    others = [place for place in asked if place not in ends]
    return sorted([*ends, *spread(others, MOST_EVALUATIONS - len(ends))])


def _rows(
    files: Sequence[Path], ids: Sequence[str], wanted: Mapping[int, Sequence[int]], damaged: list[str]
) -> dict[int, dict[int, list[dict[str, Any]]]]:
    """Rows of each prompt at each evaluation that is wanted of it."""
    prompts = {ids[prompt]: prompt for prompt in wanted}
    found: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for place, path in enumerate(files):
        names = [ids[prompt] for prompt, places in wanted.items() if place in places]
        with noting(damaged):
            for row in _of(path, names) if names else ():
                found.setdefault(prompts[row["prompt_id"]], {}).setdefault(place, []).append(row)
    return found


def _of(path: Path, prompt_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    table = read_rows(path, EVALUATION_SCHEMA, _SHOWN)
    yield from table.filter(pc.is_in(table.column("prompt_id"), pa.array(prompt_ids))).to_pylist()


def _change(rises: Rises, prompt: int, steps: Sequence[int], sign: int = 1) -> Change | None:
    by = float(rises.by_P[prompt])
    return Change(steps[rises.before_P[prompt]], steps[rises.after_P[prompt]], sign * by) if by > 0 else None


def _held_out(
    scores: Scores,
    prompt: int,
    steps: Sequence[int],
    rows: Mapping[int, Sequence[Mapping[str, Any]]],
    rise: Change | None,
    fall: Change | None,
) -> HeldOut:
    texts = {place: found[:MOST_RESPONSES] for place, found in rows.items()}
    most = MOST_CHARACTERS // sum(map(len, texts.values()))
    evaluations = []
    for place in np.flatnonzero(scores.counts_PE[prompt]):
        mean = float(scores.means_PE[prompt, place])
        responses = [Response(**response_fields(row, row["tokens"], most)) for row in texts.get(int(place), ())]
        score = None if np.isnan(mean) else mean
        evaluations.append(Evaluation(steps[place], score, int(scores.counts_PE[prompt, place]), responses))
    row = next(iter(rows.values()))[0]
    answer = None if row["answer"] is None else shorten(row["answer"])
    return HeldOut(scores.ids[prompt], shorten(row["prompt"]), answer, evaluations, rise, fall)
