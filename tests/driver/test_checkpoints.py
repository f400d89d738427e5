"""Checkpoints on disk: one that is valid at every instant, which are kept, and what damage does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.driver.checkpoints import Checkpoints, Manifest, kept
from rlsys.durable import Files, fingerprints
from rlsys.errors import DiskFullError, RunDirError

OPERATIONS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")  # all that is done by name or to disk


def manifest(version: int, seed: int = 0) -> Manifest:
    return Manifest(version, 10 * version, version, [], seed, "hash", {"tokens": 0.1 + 0.2}, {"choice": {1: "a"}})


def save(checkpoints: Checkpoints, version: int, seed: int = 0, size: int = 100) -> None:
    """A checkpoint of a few files; `seed` tells two of the same step apart."""
    folder = checkpoints.begin(version)
    (folder / "hf").mkdir(parents=True)
    for name in ("learner.json", "policy-00000.safetensors", "hf/model.safetensors"):
        (folder / name).write_bytes(bytes([version, seed]) * size)
    (folder.parent / "reference").mkdir()
    (folder.parent / "reference" / "reference.safetensors").write_bytes(bytes([version, seed]) * size)
    checkpoints.commit(manifest(version, seed), fingerprints(folder.parent))


def begin(checkpoints: Checkpoints, version: int, text: str) -> Files:
    folder = checkpoints.begin(version)
    folder.mkdir()
    (folder / "learner.json").write_text(text)
    return fingerprints(folder.parent)


def found(directory: Path) -> tuple[int, int] | None:
    """Step and seed of what a new process goes on from, checked to be whole."""
    newest = Checkpoints(directory).newest()
    if newest is None:
        return None
    version, seed = newest.manifest.version, newest.manifest.seed
    for path in newest.path.rglob("*.safetensors"):
        assert set(path.read_bytes()) <= {version, seed}
    assert len(list(newest.path.rglob("*.safetensors"))) == 3
    return version, seed


# ---- at every instant ---------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here. No `except Exception` sees it, and nothing more is done to the disk after it."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """From now on operation k and all later ones do nothing but raise; returns the list of those that are asked for."""

    def arm(k: int | None) -> list[str]:
        done: list[str] = []
        for name in OPERATIONS:
            real = getattr(os, name)
            monkeypatch.setattr(os, name, watched(name, real, done, k))
        return done

    def watched(name: str, real: Callable[..., Any], done: list[str], k: int | None) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if k is not None and len(done) >= k:
                raise Crash
            where = arguments[0]
            done.append(f"{name} {os.readlink(f'/proc/self/fd/{where}') if isinstance(where, int) else where}")
            return real(*arguments, **options)

        return call

    return arm


@pytest.mark.parametrize("redone", [False, True], ids=["a later step", "the same step again"])
def test_a_crash_at_any_operation_leaves_a_valid_checkpoint(
    tmp_path: Path, crash_at: Callable, monkeypatch: pytest.MonkeyPatch, redone: bool
) -> None:
    old, new = ((2, 0), (2, 1)) if redone else ((2, 0), (4, 1))

    def saving(directory: Path, k: int | None) -> list[str]:
        save(Checkpoints(directory, keep_last=1, keep_best=0), *old)
        with monkeypatch.context():
            operations: list[str] = crash_at(k)
            try:
                save(Checkpoints(directory, keep_last=1, keep_best=0), *new)
            except Crash:
                assert k is not None
            monkeypatch.undo()
        return operations

    total = len(saving(tmp_path / "whole", None))
    assert found(tmp_path / "whole") == new
    assert [p.name for p in (tmp_path / "whole").iterdir()] == [f"step-{new[0]:06d}"]
    seen = []
    for k in range(total):
        directory = tmp_path / str(k)
        assert len(saving(directory, k)) == k
        seen.append(found(directory))
        # and whatever was left behind, the next process saves as ever, and tidies up
        save(Checkpoints(directory, keep_last=1, keep_best=0), 6)
        assert found(directory) == (6, 0)
        assert [p.name for p in directory.iterdir()] == ["step-000006"]
    assert seen == sorted(seen, key=[old, new].index), "the new one, once it is there, stays"
    assert {*seen} == {old, new}


def test_a_crash_while_mending_leaves_a_valid_checkpoint(
    tmp_path: Path, crash_at: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process ends between the two renames, the second at any operation while it tidies up or saves."""

    def save_until(directory: Path, k: int | None, seed: int) -> list[str]:
        with monkeypatch.context():
            operations: list[str] = crash_at(k)
            try:
                save(Checkpoints(directory), 2, seed)
            except Crash:
                assert k is not None
            monkeypatch.undo()
        return operations

    save(Checkpoints(tmp_path / "whole"), 2, 0)
    operations = save_until(tmp_path / "whole", None, 1)
    between = [i for i, operation in enumerate(operations) if operation.startswith("rename")][1]
    k, done = 0, False
    while not done:
        directory = tmp_path / str(k)
        save(Checkpoints(directory), 2, 0)
        save_until(directory, between, 1)
        assert [p.name for p in sorted(directory.iterdir())] == [".step-000002.gone", ".step-000002.tmp"]
        assert found(directory) == (2, 1)
        done = len(save_until(directory, k, 2)) < k
        assert found(directory) in ([(2, 2)] if done else [(2, 1), (2, 2)])
        k += 1


def test_everything_is_on_disk_before_the_rename_and_the_name_after_it(tmp_path: Path, crash_at: Callable) -> None:
    directory = tmp_path / "checkpoints"
    save(Checkpoints(directory), 2, 0)
    operations = crash_at(None)
    save(Checkpoints(directory), 2, 1)
    aside = directory / ".step-000002.tmp"
    renames = [i for i, operation in enumerate(operations) if operation.startswith("rename")]
    assert [operations[i] for i in renames] == [f"rename {directory / 'step-000002'}", f"rename {aside}"]
    before = [operation.removeprefix("fsync ") for operation in operations[: renames[0]]]
    files = [p.relative_to(directory / "step-000002") for p in (directory / "step-000002").rglob("*")]
    assert len(files) == 8
    for path in (*(aside / file for file in files), aside, directory):
        assert str(path) in before
    assert operations[renames[1] + 1] == f"fsync {directory}"
    removals = [i for i, op in enumerate(operations) if op.startswith(("unlink", "rmdir"))]
    assert min(removals) > renames[1] + 1, "the old one is removed when the new one has its name on disk"


# ---- which are kept -----------------------------------------------------------------------------------------------


@given(
    versions=st.sets(st.integers(0, 60)),
    ratings=st.dictionaries(st.integers(0, 60), st.floats(0, 1)),
    last=st.integers(1, 5),
    best=st.integers(0, 5),
    every=st.integers(0, 7),
)
def test_what_is_kept(versions: set[int], ratings: dict[int, float], last: int, best: int, every: int) -> None:
    keep = kept(versions, ratings, last, best, every)
    assert keep <= versions
    for version in versions:
        newer = sum(other > version for other in versions)
        better = sum(
            (ratings[other], other) > (ratings[version], version)
            for other in versions & ratings.keys()
            if version in ratings
        )
        reasons = [newer < last, version in ratings and better < best, every > 0 and version % every == 0]
        assert (version in keep) == any(reasons)


def test_the_best_ones_stay_whenever_they_are_rated(tmp_path: Path) -> None:
    """Rated before its checkpoint is committed, after it, and again; by another process, too."""
    directory = tmp_path / "checkpoints"

    def names() -> list[int]:
        return Checkpoints(directory).versions()

    first = Checkpoints(directory, keep_last=1, keep_best=1, keep_every=5)
    first.rate(1, 0.5)
    save(first, 1)
    save(first, 2)
    first.rate(2, 0.25)
    save(first, 3)
    assert names() == [1, 3]
    second = Checkpoints(directory, keep_last=1, keep_best=1, keep_every=5)
    second.rate(3, 0.75)
    save(second, 4)
    assert names() == [3, 4]
    second.rate(3, 0.125)
    second.rate(4, 0.625)
    save(second, 5)
    save(second, 6)
    assert names() == [4, 5, 6]
    save(second, 7)
    assert names() == [4, 5, 7], "a multiple of 5 is kept for ever"
    second.rate(9, 0.875)
    second.forget_after(4)
    assert second.ratings() == Checkpoints(directory).ratings() == {1: 0.5, 2: 0.25, 3: 0.125, 4: 0.625}


def test_ratings_that_are_damaged_are_passed_over_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpoints(tmp_path).rate(1, 0.5)
    path = tmp_path / "ratings.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert Checkpoints(tmp_path).ratings() == {}
    assert "ratings.json, by which the best checkpoints are kept: its content has changed" in caplog.text


def test_what_is_damaged_takes_no_place(tmp_path: Path) -> None:
    """Of the steps 2, 4 and 6 the last is damaged; 5 is saved next, with two to be kept: these are 4 and 5."""
    checkpoints = Checkpoints(tmp_path, keep_last=3, keep_best=0)
    for version in (2, 4, 6):
        save(checkpoints, version)
    (tmp_path / "step-000006" / "learner" / "learner.json").unlink()
    later = Checkpoints(tmp_path, keep_last=2, keep_best=0)
    newest = later.newest()
    assert newest is not None
    assert newest.manifest.version == 4
    save(later, 5)
    assert later.versions() == [4, 5, 6]
    save(later, 6, seed=1)
    assert later.versions() == [5, 6]
    assert found(tmp_path) == (6, 1)


def test_a_copy_that_somebody_made_is_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    (tmp_path / "step-000002-good").mkdir(parents=True)
    for version in (2, 3):
        save(checkpoints, version)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002-good", "step-000003"]


# ---- damage -------------------------------------------------------------------------------------------------------

FILES = [
    "manifest.json",
    "learner/learner.json",
    "learner/policy-00000.safetensors",
    "learner/hf/model.safetensors",
    "reference/reference.safetensors",
]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "one byte flipped": flip,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 2)
    save(checkpoints, 4)
    DAMAGE[damage](tmp_path / "step-000004" / file)
    assert found(tmp_path) == (2, 0)
    [message] = caplog.messages
    assert "step-000004" in message
    assert Path(file).name in message


def test_every_flipped_byte_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), 2)
    path = tmp_path / "step-000002" / "manifest.json"
    whole, content = path.read_bytes(), json.loads(path.read_text())
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        if Checkpoints(tmp_path).newest() is not None:
            assert json.loads(damaged) == content, "white space only"


def test_what_was_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 2)
    begin(checkpoints, 4, "{")
    assert found(tmp_path) == (2, 0)
    assert Checkpoints(tmp_path).versions() == [2]
    save(Checkpoints(tmp_path), 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000005"]


def test_saves_that_overlap_leave_each_other_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    files = begin(checkpoints, 2, "{}")
    save(checkpoints, 3)
    checkpoints.commit(manifest(2), files)
    assert checkpoints.versions() == [2, 3]


@pytest.mark.parametrize("change", [{"format": 1}, {"version": 6}])
def test_another_format_or_step_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, int]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for version in (2, 4, 6):
        save(checkpoints, version)
    os.rename(tmp_path / "step-000006", tmp_path / "step-000008")
    if "format" in change:
        path = tmp_path / "step-000008" / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert found(tmp_path) == (4, 0)
    wanted = "is of another format" if "format" in change else "is of step 6"
    assert f"step-000008: its manifest.json {wanted}" in caplog.text


def test_when_none_is_valid_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Checkpoints(tmp_path).newest() is None
    assert caplog.messages == []
    save(Checkpoints(tmp_path), 2)
    (tmp_path / "step-000002" / "manifest.json").unlink()
    assert Checkpoints(tmp_path).newest() is None
    assert "no checkpoint in" in caplog.messages[-1]


def test_files_that_are_not_here_are_told(tmp_path: Path) -> None:
    """Whoever wrote them sees another folder under this name: on a cluster without shared storage."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 2)
    files = begin(checkpoints, 4, "{}")
    shutil.rmtree(tmp_path / ".step-000004.tmp" / "learner")
    with pytest.raises(RunDirError, match=r"learner/learner\.json is missing: run\.dir has to be on storage that all"):
        checkpoints.commit(manifest(4), files)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


# ---- a full disk --------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_new_checkpoint_and_no_other(small_disk: Callable) -> None:
    disk = small_disk(kib=400)
    directory = disk.path / "checkpoints"
    checkpoints = Checkpoints(directory)
    save(checkpoints, 2, size=10_000)
    disk.fill(free_kib=80)  # the four files fit, the manifest does not
    with pytest.raises(DiskFullError, match=r"\.step-000004\.tmp cannot be written: the disk is full.*same command"):
        save(checkpoints, 4, size=10_000)
    assert [p.name for p in directory.iterdir()] == ["step-000002"], "nothing half-written holds the space"
    assert found(directory) == (2, 0)
    disk.fill()
    with pytest.raises(DiskFullError, match=r"ratings\.json"):
        checkpoints.rate(2, 0.5)
    disk.grow(kib=800)
    save(checkpoints, 4, size=10_000)
    assert found(directory) == (4, 0)
