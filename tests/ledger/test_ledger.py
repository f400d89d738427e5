"""The ledger: one fate per prompt, its events, and what survives a death of the process."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import DataError, DiskFullError, RlsysError, RunDirError
from rlsys.ledger.ledger import Ledger
from rlsys.ledger.story import read_run, read_story
from rlsys.types import GroupInfo, Prompt


def prompt(index: int) -> Prompt:
    return Prompt(f"p{index}", index, np.array([1], np.int32), "text", "task", None, seed=index)


def info(index: int, version: int = 0) -> GroupInfo:
    return GroupInfo(
        f"p{index}", index, "generator-0", (3, 4), version, version, 0, (1.0, float("nan")), ("ok", "timeout")
    )


def bring(ledger: Ledger, index: int, to: str, step: int = 1) -> None:
    ledger.drawn(prompt(index))
    if to in ("buffered", "trained"):
        ledger.assigned(f"p{index}", "generator-0", 1)
        ledger.sampled(info(index))
        ledger.scored(info(index), "rewarder-0")
        ledger.buffered(info(index))
    if to == "trained":
        ledger.trained([f"p{index}"], step)
    if to == "dropped":
        ledger.dropped(f"p{index}", "zero variance", version=0)


def test_every_prompt_has_one_fate(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for index, state in enumerate(["pending", "buffered", "trained", "trained", "dropped"]):
        bring(ledger, index, state)
    ledger.drawn(prompt(9))
    ledger.dropped("p9", "rewards failed: timeout after 3 s", version=0)
    assert ledger.fates() == {"trained": 2, "dropped": {"zero variance": 1, "rewards failed": 1}, "pending": 2}
    assert [(o.id, o.state) for o in ledger.outstanding()] == [("p0", "pending"), ("p1", "buffered")]
    assert ledger.next_index() == 10
    for wrong in (
        lambda: ledger.trained(["p2"], 2),
        lambda: ledger.trained(["p0"], 2),
        lambda: ledger.dropped("p4", "again", 0),
        lambda: ledger.buffered(info(3)),
        lambda: ledger.drawn(prompt(1)),
    ):
        with pytest.raises(RlsysError, match=r"ledger .* is "):
            wrong()
    ledger.close()


@settings(max_examples=50, deadline=None)
@given(moves=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["pending", "buffered", "trained", "dropped"]))))
def test_the_file_itself_refuses_a_second_fate(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str]]
) -> None:
    """Any sequence of bare SQL updates: once trained or dropped, the only way on is to be pending again."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    ledger = Ledger(path)
    for index in range(4):
        ledger.drawn(prompt(index))
    ledger.close()
    columns = {"trained": (None, 1, 1), "dropped": ("why", None, 1)}
    state = dict.fromkeys(range(4), "pending")
    with sqlite3.connect(path) as db:
        for index, new in moves:
            allowed = not (state[index] in ("trained", "dropped") and new != "pending") and not (
                new == "trained" and state[index] != "buffered"
            )
            values = (new, *columns.get(new, (None, None, None)), index)
            try:
                db.execute("UPDATE prompts SET state = ?, reason = ?, step = ?, settled = ? WHERE idx = ?", values)
                assert allowed
                state[index] = new
            except sqlite3.IntegrityError:
                assert not allowed
        with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
            db.execute("DELETE FROM prompts WHERE idx = 0")


def test_the_whole_story_of_a_prompt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.drawn(prompt(0))
    ledger.assigned("p0", "generator-1", 1)
    ledger.failed("p0", "generator-1", "killed")
    ledger.assigned("p0", "generator-0", 2)
    ledger.sampled(info(0, version=4))
    ledger.scored(info(0, version=4), "rewarder-0")
    ledger.buffered(info(0, version=4))
    ledger.trained(["p0"], 5)
    ledger.note("resumed", step=3)
    ledger.remember("eval.before", {"accuracy": 0.25})
    ledger.close()
    story = read_story(tmp_path, "p0")
    names = ["drawn", "assigned", "failed", "assigned", "sampled", "scored", "buffered", "trained"]
    assert [event.event for event in story.events] == names
    assert story.events[2].detail == {"worker": "generator-1", "cause": "killed"}
    assert story.events[5].detail["statuses"] == {"ok": 1, "timeout": 1}
    row = story.prompt
    assert (row["state"], row["step"], row["attempts"], row["generator"]) == ("trained", 5, 2, "generator-0")
    assert (row["min_version"], row["lengths"], row["scores"]) == (4, [3, 4], [1.0, None])
    run = read_run(tmp_path)
    assert run.fates == {"trained": 1, "dropped": {}, "pending": 0}
    assert run.facts == {"eval.before": {"accuracy": 0.25}}
    assert [note.event for note in run.notes] == ["resumed"]
    assert run.steps == [{"step": 5, "prompts": 1, "min_version": 4, "max_version": 4, "score_mean": 1.0}]
    with pytest.raises(DataError, match="'nope' was never drawn"):
        read_story(tmp_path, "nope")
    with pytest.raises(RunDirError, match="no run directory"):
        read_run(tmp_path / "elsewhere")


def test_rolling_back_undoes_later_fates_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    bring(ledger, 0, "trained", step=1)
    bring(ledger, 1, "dropped")
    position = ledger.position
    bring(ledger, 2, "trained", step=2)
    bring(ledger, 3, "dropped")
    bring(ledger, 4, "buffered")
    ledger.close()
    ledger = Ledger(path)
    assert ledger.roll_back(position) == 2
    assert ledger.fates() == {"trained": 1, "dropped": {"zero variance": 1}, "pending": 3}
    assert [(o.index, o.state) for o in ledger.outstanding()] == [(2, "pending"), (3, "pending"), (4, "buffered")]
    ledger.drawn(prompt(2))
    ledger.buffered(info(2))
    ledger.trained(["p2"], 2)
    with pytest.raises(RunDirError, match="replaced or is damaged"):
        ledger.roll_back(10**6)
    ledger.close()
    assert [e.event for e in read_story(tmp_path, "p2").events][-4:] == [
        "rolled back",
        "drawn again",
        "buffered",
        "trained",
    ]


def test_only_one_process_writes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(RunDirError, match="in use by another process"):
        Ledger(tmp_path / "ledger.sqlite")
    ledger.close()
    Ledger(tmp_path / "ledger.sqlite").close()


def test_what_was_flushed_outlives_a_kill(tmp_path: Path) -> None:
    program = f"""
import asyncio, os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_ledger import bring
from rlsys.ledger.ledger import Ledger
async def main():
    ledger = Ledger(Path({str(tmp_path)!r}) / "ledger.sqlite")
    bring(ledger, 0, "trained")
    bring(ledger, 1, "buffered")
    await ledger.flush()
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == -9
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.fates() == {"trained": 1, "dropped": {}, "pending": 1}
    ledger.close()


def test_a_failure_to_write_is_raised(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    bring(ledger, 0, "trained")
    asyncio.run(ledger.flush())
    ledger.drawn(prompt(0))  # known to the file only
    with pytest.raises(RlsysError, match="could not be written: UNIQUE"):
        asyncio.run(ledger.flush())
    with pytest.raises(RlsysError, match="could not be written"):
        ledger.note("more")


# ---- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A ledger of 60 prompts, closed."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for index in range(60):
        bring(ledger, index, ["trained", "dropped", "buffered", "pending"][index % 4], step=1 + index // 8)
    ledger.close()
    return tmp_path / "ledger.sqlite"


def overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "last page gone": lambda path: os.truncate(path, path.stat().st_size - 4096),
    "garbage in the middle": lambda path: overwrite(path, path.stat().st_size // 2, b"\xff" * 64),
    "garbage header": lambda path: overwrite(path, 0, b"not SQLite at all"),
    "text": lambda path: path.write_text("something else") and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_is_refused_with_one_message(whole: Path, damage: str) -> None:
    DAMAGE[damage](whole)
    for _ in range(2):  # and lets go of the file
        with pytest.raises(RunDirError, match=r"ledger .*ledger\.sqlite is damaged .*another run\.dir; `rlsys export"):
            Ledger(whole)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("UPDATE prompts SET step = 9 WHERE id = 'p0'", "fate of a prompt"),
        ("UPDATE prompts SET settled = settled + 1 WHERE id = 'p1'", "fate of a prompt"),
        ("UPDATE prompts SET reason = 'another' WHERE id = 'p1'", "fate of a prompt"),
        ("UPDATE events SET event = 'dropped' WHERE event = 'trained'", "fate of a prompt"),
        ("DELETE FROM events WHERE position = 3", "an event is missing"),
    ],
)
def test_what_does_not_fit_together_is_noticed(whole: Path, change: str, what: str) -> None:
    """As a flipped byte within a record would do it, which SQLite knows nothing of."""
    with sqlite3.connect(whole) as db:
        db.execute("DROP TRIGGER one_fate")
        db.execute(change)
    db.close()
    with pytest.raises(RunDirError, match=f"is damaged .*{what}"):
        Ledger(whole)


def test_flipped_bits_change_no_fate_unnoticed(whole: Path) -> None:
    def fates(path: Path) -> list[Any]:
        with closing(sqlite3.connect(path)) as db:
            return db.execute("SELECT id, idx, state, reason, step, settled FROM prompts ORDER BY idx").fetchall()

    content, wanted = whole.read_bytes(), fates(whole)
    rng = random.Random(0)
    noticed = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        whole.write_bytes(damaged)
        for beside in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
            whole.with_name(beside).unlink(missing_ok=True)
        try:
            Ledger(whole).close()
        except RunDirError:
            noticed += 1
        else:
            assert fates(whole) == wanted
    assert noticed > 30


def test_a_damaged_ledger_is_named_by_readers(whole: Path) -> None:
    overwrite(whole, 0, b"not SQLite at all")
    with pytest.raises(RunDirError, match="is damaged"):
        read_run(whole.parent)


def test_what_was_flushed_outlives_the_loss_of_the_wal(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    bring(ledger, 0, "trained")
    asyncio.run(ledger.flush())
    position = ledger.position
    bring(ledger, 1, "buffered")
    ledger.note("the end")
    ledger.fates()  # has all of it in the WAL
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "ledger.sqlite", tmp_path / "copy")
    ledger.close()
    copy = Ledger(tmp_path / "copy" / "ledger.sqlite")
    assert copy.position >= position
    assert copy.roll_back(position) == 0
    assert copy.fates()["trained"] == 1
    copy.close()


def test_a_full_disk_is_told_and_nothing_written_is_lost(small_disk: Callable) -> None:
    disk = small_disk(kib=400)
    path = disk.path / "ledger.sqlite"
    ledger = Ledger(path)
    bring(ledger, 0, "trained")
    asyncio.run(ledger.flush())
    disk.fill()
    message = r"ledger\.sqlite cannot be written: the disk is full.*the same command goes on"
    for index in range(1, 200):  # more than fits into what the files have of their last blocks
        bring(ledger, index, "trained")
    with pytest.raises(DiskFullError, match=message):
        asyncio.run(ledger.flush())
    with pytest.raises(DiskFullError, match=message):
        ledger.note("more")
    with pytest.raises(DiskFullError, match=message):
        ledger.close()
    disk.grow(kib=2000)
    ledger = Ledger(path)
    assert ledger.fates() == {"trained": 1, "dropped": {}, "pending": 0}
    bring(ledger, 1, "trained")
    asyncio.run(ledger.flush())
    ledger.close()


@pytest.mark.parametrize("free_kib", [0, 4, 8, 16, 32, 48])
def test_a_ledger_cannot_be_begun_on_a_full_disk(small_disk: Callable, free_kib: int) -> None:
    """SQLite says it in several ways, by which of its files found no room."""
    disk = small_disk(kib=200)
    disk.fill(free_kib)
    with pytest.raises(DiskFullError, match=r"ledger\.sqlite cannot be written"):
        Ledger(disk.path / "ledger.sqlite")
    disk.grow(kib=2000)
    Ledger(disk.path / "ledger.sqlite").close()
