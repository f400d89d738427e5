"""What held-out prompts were answered: on disk as it was, one file an evaluation, whole at any time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.errors import DataError, DiskFullError
from rlsys.ledger.store import RolloutStore
from rlsys.ledger.story import evaluation_files, read_responses
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, VersionSpan


def group(prompt_id: str, texts: Sequence[str], rewards: Sequence[Reward], answer: str | None = "4") -> ScoredGroup:
    """Responses of two tokens, of versions 3 and 4."""
    prompt = Prompt(prompt_id, 0, np.array([7], np.int32), f"{prompt_id}?", "sums", answer, seed=0)
    rollouts = tuple(
        Rollout(
            *(prompt_id, sample, np.array([1, 2], np.int32), np.ones(2, bool), np.zeros(2, np.float32)),
            *((VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)), "stop", text),
        )
        for sample, text in enumerate(texts)
    )
    return ScoredGroup(RolloutGroup(prompt, rollouts, "generator-0"), tuple(rewards))


HALF: Any = np.float32(0.5)  # as a reward function in NumPy returns it
RIGHT = Reward("ok", 1.0, {"sums": 1.0, "brevity": HALF})
LATE = Reward("timeout", math.nan, {}, "sums: no answer in 3 s")


async def evaluate(store: RolloutStore, step: int, *groups: ScoredGroup) -> None:
    await store.evaluated(step, [row for found in groups for row in await store.responses(found)])


async def test_responses_are_read_as_they_were(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts")
    await evaluate(store, 50, group("a", ["2+2=4 ✓", ""], [RIGHT, LATE]), group("b", ["5"], [RIGHT], answer=None))
    first, second = read_responses(tmp_path, "a")
    assert math.isnan(second.pop("score"))
    common = {"task": "sums", "finish_reason": "stop", "tokens": 2, "step": 50, "prompt_id": "a", "prompt": "a?"}
    spans = [{"version": 3, "start": 0, "end": 1}, {"version": 4, "start": 1, "end": 2}]
    common |= {"answer": "4", "version_spans": spans}
    ok = {"reward_status": "ok", "score": 1.0, "components": '{"sums": 1.0, "brevity": 0.5}', "reward_detail": ""}
    late = {"reward_status": "timeout", "components": "{}", "reward_detail": "sums: no answer in 3 s"}
    assert first == {**common, **ok, "sample": 0, "text": "2+2=4 ✓"}
    assert second == {**common, **late, "sample": 1, "text": ""}
    [other] = read_responses(tmp_path, "b")
    assert (other["answer"], other["text"]) == (None, "5")
    assert read_responses(tmp_path, "c") == []


async def test_an_evaluation_takes_the_place_of_the_one_before_at_its_step(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts")
    for step in (0, 50, 1_000_000):
        await evaluate(store, step, group("a", [f"at {step}"], [RIGHT]), group("b", ["x"], [RIGHT]))
    await evaluate(store, 50, group("a", ["again"], [RIGHT]))
    assert [row["text"] for row in read_responses(tmp_path, "a")] == ["at 0", "again", "at 1000000"]
    assert [row["step"] for row in read_responses(tmp_path, "b")] == [0, 1_000_000]
    await evaluate(store, 50)
    assert [row["step"] for row in read_responses(tmp_path, "a")] == [0, 1_000_000], "nothing could be answered"
    assert list(evaluation_files(tmp_path)) == [0, 50, 1_000_000]


async def test_what_comes_after_a_checkpoint_is_taken_away_with_it(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts")
    for step in (0, 10, 20, 30):
        await evaluate(store, step, group("a", ["x"], [RIGHT]))
    await store.roll_back(20)
    assert list(evaluation_files(tmp_path)) == [0, 10, 20]


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts")
    await evaluate(store, 0, group("a", ["x"], [RIGHT]))
    path = evaluation_files(tmp_path)[0]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"step-000000\.parquet is damaged"):
        read_responses(tmp_path, "a")


async def test_on_a_full_disk_the_file_before_is_still_there(small_disk: Callable) -> None:
    disk = small_disk(kib=200)
    store = RolloutStore(disk.path / "rollouts")
    await evaluate(store, 50, group("a", ["before"], [RIGHT]))
    disk.fill(free_kib=4)
    with pytest.raises(DiskFullError, match=r"evaluations/step-000050\.parquet cannot be written: the disk is full"):
        await evaluate(store, 50, group("a", [os.urandom(50_000).hex()], [RIGHT]))
    assert [row["text"] for row in read_responses(disk.path, "a")] == ["before"]
    assert list(disk.path.rglob("*.tmp")) == [], "nothing half-written holds the space"
