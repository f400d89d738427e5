"""A run in a storage: whatever is cut off, another machine finds a state that is whole."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config.models import Config
from rlsys.driver.archive import Archive, Mark, State, bring, states, take_over
from rlsys.driver.checkpoints import Checkpoints, Manifest
from rlsys.errors import RunDirError, StorageError
from rlsys.ledger.story import read_run
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.storage import Storage, deliver, fetch, let_go

from .test_resume import DropSome, crashed

STAYING = ("run.lock",)


class Crash(BaseException):
    """The process ends here. No `except Exception` sees it."""


class Failing(LocalFileSystem):
    """A storage on a disk, whose operations end with the process from a certain one on."""

    protocol = "failing"
    done: ClassVar[list[str]] = []
    limit: ClassVar[int | None] = None  # how many are done
    half: ClassVar[bool] = False  # the first one that is not leaves half a file
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def arm(cls, limit: int | None, half: bool = False) -> None:
        cls.done, cls.limit, cls.half = [], limit, half

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("failing://")))

    def _met(self, operation: str, path: str, content: Callable[[], bytes] = bytes) -> None:
        with self.lock:
            if self.limit is not None and len(self.done) >= self.limit:
                if self.half and len(self.done) == self.limit and operation == "write":
                    type(self).half = False
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    Path(path).write_bytes(content()[: len(content()) // 2])
                raise Crash
            self.done.append(f"{operation} {path}")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._met("write", rpath, Path(lpath).read_bytes)
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._met("write", path, lambda: value)
        super().pipe_file(path, value, **options)

    def rm_file(self, path: str) -> None:
        self._met("delete", path)
        super().rm_file(path)


@pytest.fixture(autouse=True)
def _failing() -> Iterator[None]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.arm(None)
    yield
    Failing.arm(None)


class Machine:
    """One driver on one machine: a working copy, and what it saves. The content of all files tells step and seed."""

    def __init__(self, url: str, run_dir: Path, **keep: int) -> None:
        self.run_dir, self.storage = run_dir, Storage(url)
        self.said: list[str] = []
        run_dir.mkdir(parents=True, exist_ok=True)
        self.known = bring(self.storage, run_dir, STAYING, self.said.append)
        self.archive = Archive.of(self.storage, run_dir)
        self.checkpoints = Checkpoints(run_dir / "checkpoints", **keep, shelf=self.archive)

    def save(self, version: int, seed: int = 0) -> None:
        """The run directory goes ahead, and a checkpoint of it is made."""
        self.work(version, seed)
        place = self.checkpoints.begin(version)
        files = {
            f"learner/{name}": f for name, f in deliver(place, lambda folder: _parts(folder, version, seed)).items()
        }
        self.checkpoints.commit(Manifest(version, version, 0, [], seed, "hash", {}, {}), files)

    def work(self, version: int, seed: int) -> None:
        """As the driver does: a ledger, a line of figures, a file of the step, one that others take the place of."""
        (self.run_dir / "config.yaml").write_text("run: {}\n")
        (self.run_dir / "rollouts" / "pending").mkdir(parents=True, exist_ok=True)
        (self.run_dir / "rollouts" / f"step-{version:06d}.parquet").write_bytes(bytes([version, seed]) * 50)
        for old in (self.run_dir / "rollouts" / "pending").iterdir():
            old.unlink()
        (self.run_dir / "rollouts" / "pending" / f"{version:09d}.parquet").write_bytes(bytes([version, seed]) * 20)
        with (self.run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": version, "seed": seed}) + "\n")
        with closing(sqlite3.connect(self.run_dir / "ledger.sqlite")) as ledger:
            ledger.execute("PRAGMA journal_mode=WAL")
            ledger.execute("CREATE TABLE IF NOT EXISTS events (step, seed)")
            ledger.execute("INSERT INTO events VALUES (?, ?)", (version, seed))
            ledger.commit()

    def found(self) -> tuple[int, int] | None:
        """Step and seed of what it goes on from, checked to be whole, and the working copy to be of then or later."""
        newest = self.checkpoints.newest()
        if newest is None:
            return None
        version, seed = newest.manifest.version, newest.manifest.seed
        folder = fetch(newest.learner)
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
            "learner.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert {p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {bytes([version, seed])}
        let_go(newest.learner)
        with closing(sqlite3.connect(self.run_dir / "ledger.sqlite")) as ledger:
            assert (version, seed) in ledger.execute("SELECT step, seed FROM events").fetchall()
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert {"step": version, "seed": seed} in rows
        rollouts = (self.run_dir / "rollouts" / f"step-{version:06d}.parquet").read_bytes()
        assert rollouts[0] == version
        assert rollouts[1] >= seed, "of then or later"
        assert rollouts == rollouts[:2] * 50
        return version, seed


def _parts(folder: Path, version: int, seed: int) -> None:
    for name in ("learner.json", "hf/model.safetensors", "hf/tokenizer.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([version, seed]))


def until(limit: int | None, work: Callable[[], object], half: bool = False) -> int:
    """Do something, of which so many operations on the storage are done; returns how many there were."""
    Failing.arm(limit, half)
    try:
        work()
    except Crash:
        assert limit is not None
    count = len(Failing.done)
    Failing.arm(None)
    return count


# ---- at every instant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["between two operations", "in the middle of a file"])
@pytest.mark.parametrize("redone", [False, True], ids=["a later step", "the same step again"])
def test_a_cut_at_any_operation_leaves_a_state_that_is_whole(tmp_path: Path, redone: bool, half: bool) -> None:
    old, new = ((2, 0), (2, 1)) if redone else ((2, 0), (4, 1))
    keep = {"keep_last": 1, "keep_best": 0}

    template = tmp_path / "template"
    for saved in ((1, 0), old):
        Machine(f"failing://{template}/storage", template / "first", **keep).save(*saved)

    def cut(base: Path, k: int | None) -> int:
        shutil.copytree(template, base)
        url = f"failing://{base}/storage"
        return until(k, lambda: Machine(url, base / "first", **keep).save(*new), half)

    total = cut(tmp_path / "whole", None)
    assert Machine(f"failing://{tmp_path}/whole/storage", tmp_path / "whole" / "other").found() == new
    seen = []
    for k in range(total):
        base, url = tmp_path / str(k), f"failing://{tmp_path / str(k)}/storage"
        assert cut(base, k) == k
        seen.append(Machine(url, base / "other").found())
        # and the first machine, whose working copy is ahead, goes on as well
        first = Machine(url, base / "first", **keep)
        assert first.found() == seen[-1]
        first.save(6)
        assert Machine(url, base / "third").found() == (6, 0)
        assert_tidy(base / "storage", steps=2)
        shutil.rmtree(base)
    assert seen == sorted(seen, key=lambda found: found == new), "the new one, once it is there, stays"
    assert {*seen} == {old, new}


def assert_tidy(storage: Path, steps: int) -> None:
    """What the newest two states name is there, and nothing else."""
    found = list(states(Storage(f"file://{storage}")))
    assert len(found) == len(list((storage / "states").iterdir())) == 2
    files = {f"{push}/{name}" for state in found for name, (_, push) in state.files.items()}
    assert {p.relative_to(storage / "files").as_posix() for p in (storage / "files").rglob("*") if p.is_file()} == files
    folders = {name for state in found for name in state.checkpoints.values()}
    assert {p.name for p in (storage / "checkpoints").iterdir()} == folders
    assert len(folders) <= steps


@settings(max_examples=12)
@given(
    events=st.lists(
        st.tuples(
            st.booleans(),  # on the machine that was last at work, or another one
            st.integers(1, 5),  # the step
            st.none() | st.integers(0, 25),  # operations until it is cut off
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_happens_what_was_saved_is_found(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[bool, int, int | None, bool]]
) -> None:
    """Saves on machines that come and go, each cut off somewhere: what was completed is found, or what was begun."""
    base = tmp_path_factory.mktemp("runs")
    url, number, saved, maybe = f"failing://{base}/storage", 0, None, set[tuple[int, int] | None]()
    for seed, (elsewhere, step, limit, half) in enumerate(events):
        number += elsewhere
        machine = Machine(url, base / str(number))
        assert machine.found() in {saved, *maybe}
        if machine.found() != saved:
            saved = machine.found()
        maybe = set()
        last = 0 if saved is None else saved[0]
        new = (min(250, last + step), seed)
        done = False

        def work(machine: Machine = machine, new: tuple[int, int] = new) -> None:
            nonlocal done
            machine.save(*new)
            done = True

        until(limit, work, half)
        saved, maybe = (new, set()) if done else (saved, {new})
    assert Machine(url, base / "last").found() in {saved, *maybe}
    shutil.rmtree(base)


# ---- pushes -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = request.getfixturevalue("s3") if request.param == "s3" else f"file://{tmp_path / 'storage'}"
    return f"{place}/run"


def test_another_machine_has_the_run_as_it_was(url: str, tmp_path: Path) -> None:
    first = Machine(url, tmp_path / "first")
    assert not first.known
    for name in (
        "run.lock",
        "control.sock",
        ".x.tmp",
        "config.yaml.partial",
        "wandb/run-id",
        "wandb/a/b",
        "checkpoints/ratings.json",
    ):
        (first.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (first.run_dir / name).write_text(name)
    (first.run_dir / "wandb" / "latest-run").symlink_to("a")
    first.save(2)
    other = Machine(url, tmp_path / "other")
    assert other.known
    assert other.found() == (2, 0)
    assert sorted(p.relative_to(other.run_dir).as_posix() for p in other.run_dir.rglob("*") if p.is_file()) == [
        *("checkpoints/ratings.json", "config.yaml", "ledger.sqlite", "metrics.jsonl"),
        *(
            "rollouts/pending/000000002.parquet",
            "rollouts/step-000002.parquet",
            "storage.json",
            "wandb/a/b",
            "wandb/run-id",
        ),
    ]


def test_the_working_copy_has_an_outline_of_the_newest_checkpoint(url: str, tmp_path: Path) -> None:
    """What `inspect`, `report` and `status` look at."""
    first = Machine(url, tmp_path / "first")
    first.save(2)
    first.save(4)
    folder = tmp_path / "first" / "checkpoints"
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == ["step-000004/learner/hf/tokenizer.json", "step-000004/manifest.json"]


def test_only_what_has_changed_is_written(tmp_path: Path) -> None:
    url = f"failing://{tmp_path}/storage"
    first = Machine(url, tmp_path / "first")
    first.save(2)
    until(None, lambda: None)
    Failing.arm(None)
    first.save(4)
    changed = {"ledger.sqlite", "metrics.jsonl", "step-000004.parquet", "000000004.parquet"}
    assert {Path(op).name for op in Failing.done if op.startswith("write") and "/files/" in op} == changed
    # also on a machine that has only fetched it
    other = Machine(url, tmp_path / "other")
    Failing.arm(None)
    other.save(5)
    changed = {"ledger.sqlite", "metrics.jsonl", "step-000005.parquet", "000000005.parquet"}
    assert {Path(op).name for op in Failing.done if op.startswith("write") and "/files/" in op} == changed


def test_the_order_of_a_push(tmp_path: Path) -> None:
    first = Machine(f"failing://{tmp_path}/storage", tmp_path / "first", keep_last=1, keep_best=0)
    first.save(2)
    first.save(3)
    Failing.arm(None)
    first.save(4)

    def kind(operation: str) -> str:
        how, path = operation.split(" ")
        if how == "delete":
            return how
        return next(k for k in ("states", "files", "learner", "manifest", "drivers") if f"/{k}" in path)

    order = [kind(operation) for operation in Failing.done]
    assert list(dict.fromkeys(order)) == ["learner", "files", "manifest", "states", "delete"]
    assert [order.index("manifest"), order.index("states")] == [order.index("delete") - 2, order.index("delete") - 1]


def test_what_comes_after_the_last_checkpoint_is_pushed_too(url: str, tmp_path: Path) -> None:
    first = Machine(url, tmp_path / "first")
    first.archive.push()
    assert Storage(url).list().keys() == {"drivers/000001.json"}, "nothing to go on from yet"
    first.save(2)
    (first.run_dir / "summary.json").write_text("{}")
    first.archive.push()
    other = Machine(url, tmp_path / "other")
    assert other.found() == (2, 0)
    assert (other.run_dir / "summary.json").read_text() == "{}"


def test_which_are_kept(url: str, tmp_path: Path) -> None:
    """As in a folder, and what the state before has."""
    first = Machine(url, tmp_path / "first", keep_last=1, keep_best=1, keep_every=5)
    first.checkpoints.rate(1, 0.5)
    for version in range(1, 8):
        first.save(version)
    assert first.checkpoints.versions() == [1, 5, 7]
    there = {int(name.split(".")[0].removeprefix("step-")) for name in (Storage(url) / "checkpoints").list()}
    assert there == {1, 5, 6, 7}
    assert Machine(url, tmp_path / "other").checkpoints.versions() == [1, 5, 7]


# ---- working copies, and two drivers --------------------------------------------------------------------------------


def test_a_second_driver_stops_the_first(url: str, tmp_path: Path) -> None:
    first = Machine(url, tmp_path / "first")
    first.save(2)
    second = Machine(url, tmp_path / "second")
    message = r"taken over by another driver, number 2 \(host .+, process \d+, since .+\): only one may work on a run"
    with pytest.raises(RunDirError, match=message):
        first.save(4)
    with pytest.raises(RunDirError, match=message):
        first.archive.push()
    second.save(3)
    assert Machine(url, tmp_path / "third").found() == (3, 0)


def test_a_driver_that_is_overtaken_in_mid_push_harms_nothing(tmp_path: Path) -> None:
    """The second takes over between the last look of the first and its state: the first goes on to the end of its
    push, and what the second has begun to read stays."""
    url = f"file://{tmp_path}/storage"
    first = Machine(url, tmp_path / "first", keep_last=1, keep_best=0)
    for version in (1, 2, 3):
        first.save(version)
    look, looks, begun = first.archive._still_ours, itertools.count(1), list[State]()

    def looking() -> None:
        look()
        if next(looks) == 2:
            take_over(Storage(url))
            begun.extend(states(Storage(url)))

    first.archive._still_ours = looking  # type: ignore[method-assign]
    first.save(4)
    second = Machine(url, tmp_path / "second")
    assert second.found() == (4, 0)
    there = Storage(url).list()
    files, checkpoints = begun[0].files, begun[0].checkpoints
    assert all(there[f"files/{push}/{name}"] == found["bytes"] for name, (found, push) in files.items())
    assert [f"checkpoints/{name}/manifest.json" in there for name in checkpoints.values()] == [True]


def test_a_copy_that_is_newer_stays(url: str, tmp_path: Path) -> None:
    first = Machine(url, tmp_path / "first")
    first.save(2)
    first.work(3, 0)
    again = Machine(url, tmp_path / "first")
    assert again.said == []
    assert (tmp_path / "first" / "rollouts" / "step-000003.parquet").exists()
    again.work(4, 0)  # before its first push
    assert Machine(url, tmp_path / "first").said == []
    assert (tmp_path / "first" / "rollouts" / "step-000004.parquet").exists()


def test_a_copy_that_is_older_is_set_aside(url: str, tmp_path: Path) -> None:
    first = Machine(url, tmp_path / "first")
    first.save(2)
    (tmp_path / "first" / "run.lock").touch()
    first.work(3, 7)
    Machine(url, tmp_path / "second").save(4)
    again = Machine(url, tmp_path / "first")
    assert re.fullmatch(r".*first is older than .*, so it is kept as .*first\.older-1 and fetched anew", again.said[0])
    assert again.found() == (4, 0)
    assert not (tmp_path / "first" / "rollouts" / "step-000003.parquet").exists()
    assert (tmp_path / "first.older-1" / "rollouts" / "step-000003.parquet").read_bytes() == bytes([3, 7]) * 50
    assert (tmp_path / "first" / "run.lock").exists()


def test_a_folder_with_another_run_is_refused(url: str, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "metrics.jsonl").touch()
    with pytest.raises(RunDirError, match="holds a run that is not in"):
        Machine(url, tmp_path / "first")
    Machine(f"{url}-a", tmp_path / "second").save(2)
    with pytest.raises(RunDirError, match="working copy of a run that is not in"):
        Machine(f"{url}-b", tmp_path / "second")


def test_those_who_begin_at_the_same_time_have_different_numbers(url: str) -> None:
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(take_over(Storage(url)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if url.startswith("s3"):  # elsewhere whoever wrote last has it, and the other one ends at its next push
        assert sorted(numbers) == [1, 2, 3, 4]
    assert len(numbers) == 4


# ---- damage -------------------------------------------------------------------------------------------------------


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}/storage"
    for damaged, said in (
        ("files/*.3/metrics.jsonl", "metrics.jsonl"),
        ("states/*.000003.json", "passing over the state"),
    ):
        first = Machine(url, tmp_path / "first")
        for version in (1, 2, 3):
            first.save(version)
        [path] = (tmp_path / "storage").glob(damaged)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        other = Machine(url, tmp_path / "other")
        assert other.found() == (2, 0)
        assert said in caplog.text
        other.save(3, 5)
        assert Machine(url, tmp_path / "third").found() == (3, 5)
        for path in tmp_path.iterdir():
            shutil.rmtree(path)


def test_a_checkpoint_that_is_incomplete_is_passed_over(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Machine(url, tmp_path / "first")
    first.save(2)
    first.save(4)
    [name] = [n for n in Storage(url).list() if re.match(r"checkpoints/step-000004.*/hf/model.safetensors$", n)]
    Storage(url).delete([name])
    other = Machine(url, tmp_path / "other")
    assert other.found() == (2, 0)
    assert "learner/hf/model.safetensors is missing" in caplog.text


# ---- whole runs -----------------------------------------------------------------------------------------------------


def run_on(
    url: str, run_dir: Path, config: Config, act: Any = lambda s: None, **options: Any
) -> tuple[Simulation, Any]:
    machine = Machine(url, run_dir)
    return simulate(config, run_dir, act, shelf=machine.archive, **options)


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("crash_at", [3.0, 8.0, 17.0])
def test_a_run_goes_on_on_another_machine(
    tmp_path: Path, check_fates: Callable[[Path], Any], bound: int, crash_at: float
) -> None:
    settings = sim_config(steps=8, bound=bound, batch=3, checkpoint={"every": 2}, eval={"before": False})
    url = f"file://{tmp_path}/storage"
    first = crashed(
        settings, tmp_path / "first", crash_at, filters=[DropSome()], shelf=Machine(url, tmp_path / "first").archive
    )
    shutil.rmtree(tmp_path / "first")
    newest = next(states(Storage(url)), None)
    version = 0 if newest is None else max(map(int, newest.checkpoints))
    second, summary = run_on(url, tmp_path / "second", settings, filters=[DropSome()], seed=3)
    batches = first.learner.batches[:version] + second.learner.batches
    trained = [prompt_id for batch in batches for prompt_id in batch.prompt_ids]
    assert len(trained) == len(set(trained)) == 24 == summary["fates"]["trained"]
    check_fates(tmp_path / "second")
    if bound == 0:
        whole, _ = simulate(settings, tmp_path / "whole", filters=[DropSome()])
        assert batches == whole.learner.batches
        assert second.learner.state == whole.learner.state


def test_a_checkpoint_whose_content_has_changed_costs_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sizes are right, so that only those who load it can tell: the steps since the one before are repeated."""
    settings = sim_config(
        steps=4, bound=0, checkpoint={"every": 2}, eval={"before": False}, reference={"update": "every", "every": 1}
    )
    longer = settings.model_copy(update={"run": settings.run.model_copy(update={"steps": 6})})
    whole, _ = simulate(longer, tmp_path / "whole", with_reference=True)
    for part in ("learner", "reference"):
        url, base = f"file://{tmp_path}/{part}/storage", tmp_path / part
        run_on(url, base / "first", settings, with_reference=True)
        [path] = (base / "storage" / "checkpoints").glob(f"step-000004.*/{part}/{part}.json")
        path.write_text(path.read_text().replace("4", "5"))
        second, summary = run_on(url, base / "second", longer, with_reference=True)
        assert f"{part}/{part}.json has changed" in caplog.text
        assert second.learner.state == whole.learner.state
        assert second.reference.state == whole.reference.state
        assert summary["fates"] == {"trained": 24, "dropped": {}, "pending": 0}


def test_a_storage_that_fails_once_costs_a_checkpoint_and_twice_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sim_config(steps=8, bound=0, checkpoint={"every": 2}, eval={"before": False})
    put, failures = Storage.put, list[int]()

    def failing(times: tuple[int, ...]) -> None:
        def fail(self: Storage, local: Path, name: str) -> None:
            if name == "learner.json":
                failures.append(1)
                if len(failures) in times:
                    raise StorageError("the network is down")
            put(self, local, name)

        failures.clear()
        monkeypatch.setattr(Storage, "put", fail)

    failing((2,))
    _, summary = run_on(f"file://{tmp_path}/once", tmp_path / "first", settings)
    assert summary["steps"] == 8
    assert [e.event for e in read_run(tmp_path / "first").notes if e.event.startswith("checkpoint")] == [
        *("checkpoint", "checkpoint lost", "checkpoint", "checkpoint"),
    ]
    failing((2, 3))
    with pytest.raises(StorageError, match="the network is down"):
        run_on(f"file://{tmp_path}/twice", tmp_path / "second", settings)
    monkeypatch.setattr(Storage, "put", put)
    _, summary = run_on(f"file://{tmp_path}/twice", tmp_path / "third", settings)
    assert summary["fates"]["trained"] == 32


def test_a_mark_that_is_damaged_is_none(tmp_path: Path) -> None:
    Mark("copy", None, 3).write(tmp_path)
    assert Mark.read(tmp_path) == Mark("copy", None, 3)
    (tmp_path / "storage.json").write_text((tmp_path / "storage.json").read_text().replace("3", "4", 1))
    assert Mark.read(tmp_path) is None
