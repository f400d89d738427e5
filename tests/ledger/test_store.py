"""The rollout store: lossless, never half-written, and complete after any stop."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import DataError, DiskFullError, HandleLost, RlsysError
from rlsys.ledger.codec import FATE_SCHEMA, SCHEMA, decode, encode, read_rows, write_rows
from rlsys.ledger.ledger import Ledger
from rlsys.ledger.store import RolloutStore
from rlsys.ledger.story import read_story
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, Segment, VersionSpan, group_info

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6)
reals = st.floats(allow_nan=False, width=32)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)


@st.composite
def rollouts(draw: st.DrawFn, sample: int) -> Rollout:
    ids = draw(tokens)
    n = len(ids)
    cut = draw(st.integers(0, n))
    return Rollout(
        prompt_id="p",
        sample=sample,
        token_ids=np.array(ids, np.int32),
        action_mask=np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool),
        behavior_logprobs=np.array(draw(st.lists(reals, min_size=n, max_size=n)), np.float32),
        version_spans=(VersionSpan(3, 0, cut), VersionSpan(4, cut, n)),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        text=draw(st.text(st.characters(exclude_categories=["Cs"]))),
        segments=draw(st.sampled_from([(), (Segment(0, cut), Segment(cut, n, 0.5, None))])),
        parent=draw(st.sampled_from([None, (0, 2)])),
    )


@st.composite
def groups(draw: st.DrawFn) -> ScoredGroup:
    n = draw(st.integers(1, 3))
    prompt = Prompt(
        id="p",
        index=draw(st.integers(0, 10**9)),
        token_ids=np.array(draw(tokens), np.int32),
        text=draw(st.text(st.characters(exclude_categories=["Cs"]))),
        task="t",
        answer=draw(st.none() | st.just("") | st.just("42")),
        seed=draw(st.integers(0, 2**62)),
        metadata=draw(st.dictionaries(st.text(), json_values, max_size=3)),
    )
    rewards = tuple(
        draw(
            st.sampled_from(
                [Reward("ok", 0.1, {"a": 0.1, "b": -1.0}), Reward("timeout", float("nan"), {}, "a: no answer in 3 s")]
            )
        )
        for _ in range(n)
    )
    return ScoredGroup(RolloutGroup(prompt, tuple(draw(rollouts(i)) for i in range(n)), "generator-0"), rewards)


def assert_same(a: ScoredGroup, b: ScoredGroup) -> None:
    for name in ("id", "index", "text", "task", "answer", "seed"):
        assert getattr(a.prompt, name) == getattr(b.prompt, name)
    assert dict(a.prompt.metadata) == dict(b.prompt.metadata)
    assert a.group.generator == b.group.generator
    np.testing.assert_array_equal(a.prompt.token_ids, b.prompt.token_ids)
    for x, y in zip(a.rollouts, b.rollouts, strict=True):
        for name in ("prompt_id", "sample", "version_spans", "finish_reason", "text", "segments", "parent"):
            assert getattr(x, name) == getattr(y, name)
        for name in ("token_ids", "action_mask", "behavior_logprobs"):
            left, right = getattr(x, name), getattr(y, name)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
    for r, s in zip(a.rewards, b.rewards, strict=True):
        assert (r.status, dict(r.components), r.detail) == (s.status, dict(s.components), s.detail)
        np.testing.assert_equal(r.score, s.score)


@settings(max_examples=60, deadline=None)
@given(group=groups())
def test_a_group_survives_the_file(tmp_path_factory: pytest.TempPathFactory, group: ScoredGroup) -> None:
    path = tmp_path_factory.mktemp("codec") / "group.parquet"
    pq.write_table(encode([group]), path)
    assert_same(decode(pq.read_table(path)), group)


def simple(index: int, score: float = 1.0) -> ScoredGroup:
    prompt = Prompt(f"p{index}", index, np.array([7], np.int32), "1+1=", "sums", "2", seed=index)
    rollouts = tuple(
        Rollout(
            prompt.id,
            i,
            np.array([index, i], np.int32),
            np.ones(2, bool),
            np.zeros(2, np.float32),
            (VersionSpan(0, 0, 1), VersionSpan(1, 1, 2)),
            "stop",
            f"{index}/{i}",
        )
        for i in range(2)
    )
    rewards = (Reward("ok", score, {"sums": score}), Reward("ok", 0.0))
    return ScoredGroup(RolloutGroup(prompt, rollouts, "generator-0"), rewards)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.parquet"))


def test_metadata_that_json_cannot_hold_names_the_prompt() -> None:
    prompt = Prompt("p9", 9, np.array([7], np.int32), "", "", None, 0, {"what": object(), "fine": np.float32(1)})
    with pytest.raises(DataError, match="prompt p9: metadata"):
        encode([ScoredGroup(RolloutGroup(prompt, (), "g"), ())])


async def test_settled_groups_move_to_the_file_of_their_step(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    for index in range(5):
        await store.buffered(simple(index))
    assert len(names(tmp_path / "pending")) == 5
    await store.settled(["p3"], "dropped: zero variance", 0)
    await store.settled(["p2", "p0"], "trained", 1)
    rows = pq.read_table(tmp_path / "step-000001.parquet").to_pylist()
    assert {(row["prompt_id"], row["fate"], row["step"]) for row in rows} == {
        ("p0", "trained", 1),
        ("p2", "trained", 1),
        ("p3", "dropped: zero variance", 0),
    }
    assert names(tmp_path / "pending") == ["000000001.parquet", "000000004.parquet"]  # nothing else is in these
    samples = await store.samples(1, limit=1)
    assert [(s.prompt_id, s.response, s.score, s.versions) for s in samples] == [("p0", "0/0", 1.0, "0-1")]
    samples = await store.samples(1, limit=9)
    assert {s.prompt_id: s.fate for s in samples} == {"p0": "trained", "p2": "trained", "p3": "dropped: zero variance"}
    assert all(s.components == {"sums": s.score} for s in samples)
    assert await store.samples(7, limit=1) == []
    await store.settled(["p4"], "dropped: stale", 1)
    await store.close()
    assert {row["prompt_id"] for row in pq.read_table(tmp_path / "after-000001.parquet").to_pylist()} == {"p4"}
    with pytest.raises(RlsysError, match="p8 is settled, but was never buffered"):
        await store.settled(["p8"], "trained", 2)


async def test_groups_that_come_soon_after_each_other_share_a_file(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path, linger_s=0.05)
    first = asyncio.ensure_future(store.buffered(simple(0)))
    await asyncio.sleep(0)  # it has come before the others
    await asyncio.gather(first, *(store.buffered(simple(index)) for index in (1, 2)))
    [file] = (tmp_path / "pending").glob("*.parquet")
    assert list(await RolloutStore(tmp_path).load_buffered()) == ["p0", "p1", "p2"]
    await store.settled(["p0", "p1", "p2"], "trained", 1)
    assert not file.exists()
    await store.close()


async def test_what_is_lost_is_told_to_who_gave_it_alone(tmp_path: Path) -> None:
    def fetch(handles: Sequence[Any]) -> list[Any]:
        return [HandleLost("gone") if handle is None else handle for handle in handles]

    store = RolloutStore(tmp_path, fetch)
    found = await asyncio.gather(*map(store.buffered, (simple(0), None, simple(2))), return_exceptions=True)
    assert [type(one) for one in found] == [type(None), HandleLost, type(None)]
    with pytest.raises(HandleLost):
        await store.buffered(None)
    await store.settled(["p0", "p2"], "trained", 1)
    assert not list((tmp_path / "pending").iterdir())
    await store.close()


async def test_a_later_process_finds_what_was_buffered(tmp_path: Path) -> None:
    before = RolloutStore(tmp_path)
    for index in range(4):
        await before.buffered(simple(index))
    await before.settled(["p0"], "trained", 1)
    (tmp_path / "pending" / "000000009.parquet").write_bytes(b"half a fi")
    after = RolloutStore(tmp_path)  # the first one was killed: never closed
    found = await after.load_buffered()
    assert list(found) == ["p1", "p2", "p3"]
    assert_same(found["p2"].payload, simple(2))
    info = found["p2"].info
    assert (info.index, info.min_version, info.max_version, info.scores) == (2, 0, 1, (1.0, 0.0))
    assert info.tokens_by_version == ((0, 2), (1, 2))
    await after.discard(["p1"])
    await after.settled(["p2"], "trained", 2)
    await after.settled(["p3"], "trained", 3)
    await after.roll_back(2)
    assert names(tmp_path) == ["step-000001.parquet", "step-000002.parquet"]
    assert names(tmp_path / "pending") == []


async def test_groups_finished_together_share_a_file(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    await asyncio.gather(*(store.buffered(simple(index)) for index in range(6)))
    files = names(tmp_path / "pending")
    assert len(files) < 6
    await store.settled(["p0", "p5"], "trained", 1)
    assert {row["prompt_id"] for row in pq.read_table(tmp_path / "step-000001.parquet").to_pylist()} == {"p0", "p5"}
    later = RolloutStore(tmp_path)
    found = await later.load_buffered()
    assert {"p1", "p2", "p3", "p4"} <= set(found)
    assert_same(found["p3"].payload, simple(3))
    await later.discard(sorted(set(found) - {"p3"}))
    last = RolloutStore(tmp_path)
    assert list(await last.load_buffered()) == ["p3"]
    await last.settled(["p3"], "trained", 2)
    assert names(tmp_path / "pending") == []


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "end cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "no Parquet": lambda path: path.write_bytes(b"half a fi") and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_file_of_buffered_groups_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    before = RolloutStore(tmp_path)
    for index in range(3):
        await before.buffered(simple(index))
    DAMAGE[damage](tmp_path / "pending" / "000000001.parquet")
    (tmp_path / "pending" / "000000003.tmp").write_bytes(b"half a file, written aside")
    found = await RolloutStore(tmp_path).load_buffered()
    assert list(found) == ["p0", "p2"]
    [message] = caplog.messages
    assert "000000001.parquet is damaged" in message
    assert "sampled again" in message
    assert "kept as 000000001.damaged" in message
    assert list(await RolloutStore(tmp_path).load_buffered()) == ["p0", "p2"]
    assert len(caplog.messages) == 1, "said once"


def test_no_flipped_bit_is_read_as_something_else(tmp_path: Path) -> None:
    """Of 600 flips, all over the file and in its footer: what is read is what was written, or nothing is."""
    table = encode([simple(index) for index in range(3)])
    path, damaged = tmp_path / "whole.parquet", tmp_path / "damaged.parquet"
    write_rows(table, path, compression="NONE", use_dictionary=False)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    rng = random.Random(0)
    refused = 0
    for place in [*rng.sample(range(len(whole)), 300), *rng.sample(range(footer, len(whole)), 300)]:
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        damaged.write_bytes(content)
        try:
            assert read_rows(damaged, SCHEMA).equals(table), f"byte {place}"
        except DataError:
            refused += 1
    assert refused > 300


def test_a_file_of_fewer_rows_or_other_columns_is_refused(tmp_path: Path) -> None:
    table = encode([simple(0)])
    path = tmp_path / "rows.parquet"
    write_rows(table, path)
    fewer = pq.read_table(path).slice(0, 1)  # with the number of rows that there were
    pq.write_table(fewer, path)
    with pytest.raises(DataError, match="has 1 rows, expected 2"):
        read_rows(path, SCHEMA)
    write_rows(table.drop_columns(["seed"]), path)
    with pytest.raises(DataError, match="of another version of rlsys"):
        read_rows(path, SCHEMA)


async def test_a_damaged_final_file_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    store = RolloutStore(tmp_path / "rollouts")
    ledger.drawn(simple(0).prompt)
    ledger.buffered(group_info(simple(0).group, simple(0).rewards))
    ledger.trained(["p0"], 1)
    ledger.close()
    await store.buffered(simple(0))
    await store.settled(["p0"], "trained", 1)
    path = tmp_path / "rollouts" / "step-000001.parquet"
    assert [row["text"] for row in read_story(tmp_path, "p0").rollouts] == ["0/0", "0/1"]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"step-000001\.parquet is damaged"):
        read_story(tmp_path, "p0")


async def test_a_full_disk_is_told_and_nothing_good_is_lost(tmp_path: Path, small_disk: Callable) -> None:
    disk = small_disk(kib=200)
    store = RolloutStore(disk.path / "rollouts")
    for index in range(3):
        await store.buffered(simple(index))
    disk.fill(free_kib=4)
    with pytest.raises(DiskFullError, match=r"000000003\.parquet cannot be written: the disk is full.*same command"):
        await store.buffered(simple(3))
    with pytest.raises(DiskFullError, match=r"step-000001\.parquet"):
        await store.settled(["p0", "p1"], "trained", 1)
    assert list(disk.path.rglob("*.tmp")) == [], "nothing half-written holds the space"
    disk.grow(kib=1000)
    after = RolloutStore(disk.path / "rollouts")
    found = await after.load_buffered()
    assert list(found) == ["p0", "p1", "p2"]
    await after.settled(["p0", "p1"], "trained", 1)
    assert read_rows(disk.path / "rollouts" / "step-000001.parquet", FATE_SCHEMA).num_rows == 4


async def test_a_failure_to_write_reaches_the_caller(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    (tmp_path / "pending").rmdir()
    with pytest.raises(RlsysError, match="cannot be written"):
        await store.buffered(simple(0))
