"""A run in a storage (`run.storage`): all that another machine needs to go on with it.

    URL/checkpoints/step-000050.3.7/learner/...   as in a folder; `3.7`: the 7th push of the 3rd driver
    URL/checkpoints/step-000050.3.7/manifest.json
    URL/files/3.7/ledger.sqlite, rollouts/...     files of the run directory that have changed since the push before
    URL/states/000003.000007.json                 a state: which checkpoints, and where every file of the directory is
    URL/drivers/000003.json                       who the 3rd driver is

Nothing is ever written twice. A push writes, in this order: the parts of a checkpoint, the changed files, the manifest
of the checkpoint, the state. What no state names does not count, so at every instant a cut leaves the state before or
the new one, whole. The newest two states are kept with all that they name; whatever else is of no later driver goes.

**One driver.** Whoever begins to work on a run takes the next number first. A driver that finds a higher number than
its own ends at its next push, and the state of a higher number is the newer one whatever its push. The second state is
kept for that: a driver that has just been overtaken may be in the middle of its last push, which takes away
nothing that its successor has begun to read.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlsys.config.sizes import SIZES
from rlsys.driver.shelf import MANIFEST, Found, Keep
from rlsys.durable import Files, Fingerprint, fingerprint, replace_text, seal, unseal, writing
from rlsys.errors import DamagedFileError, RunDirError, StorageError
from rlsys.ledger.ledger import ledger_error
from rlsys.ledger.story import LEDGER_FILE
from rlsys.storage import Storage, in_parallel, scratch
from rlsys.trackers.jsonl import METRICS

logger = logging.getLogger(__name__)

MARK = "storage.json"  # in a run directory: what it is a copy of
CONFIG = "config.yaml"  # there: first to come and last to go, so that it is a run directory at any time
FORMAT = 1
CHECKPOINTS, FILES, STATES, DRIVERS = "checkpoints", "files", "states", "drivers"
_NOT_PUSHED = re.compile(
    rf"(.*/)?(\..*|.*\.(lock|sock|partial|tmp|damaged))|{re.escape(MARK)}|{re.escape(SIZES)}|{re.escape(LEDGER_FILE)}(-.*)?|checkpoints/.*step-.*"
)
_STATE = re.compile(r"(\d+)\.(\d+)\.json")
_TRIES = 20  # for the number of a driver, when several begin at the same time


@dataclass(frozen=True, slots=True)
class State:
    """What a push has left. `copy`: of which run directory. `files`: of it, and in which push they were written."""

    driver: int
    push: int
    copy: str
    checkpoints: Mapping[str, str] = field(default_factory=dict)  # version -> name of the folder
    files: Mapping[str, tuple[Fingerprint, str]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.driver}.{self.push}"


@dataclass(frozen=True, slots=True)
class Mark:
    """Of a run directory that is the working copy of a stored run: its own name, the newest state that it is a
    continuation of (null: none), and the number of the driver that works on it."""

    copy: str
    state: str | None
    driver: int

    @staticmethod
    def read(run_dir: Path) -> Mark | None:
        """None where there is none that can be read."""
        try:
            return Mark(**unseal((run_dir / MARK).read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, run_dir: Path) -> None:
        with writing(run_dir / MARK):
            replace_text(run_dir / MARK, seal(asdict(self)))

    def continues(self, state: State) -> bool:
        """Whether the working copy is as new as the state, or newer."""
        return state.id == self.state or state.copy == self.copy


# ---- the states of a run --------------------------------------------------------------------------------------------


def states(storage: Storage) -> Iterator[State]:
    """Those that are whole, newest first."""
    names = [
        (int(found[1]), int(found[2]), name) for name in (storage / STATES).list() if (found := _STATE.fullmatch(name))
    ]
    for driver, push, name in sorted(names, reverse=True):
        text = (storage / STATES).read(name)
        try:
            content = unseal(text or "")
            if content.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            state = State(**content)
            if (state.driver, state.push) != (driver, push):
                raise ValueError(f"it is of push {state.id}")
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("passing over the state %s/%s/%s: %s", storage, STATES, name, error)
            continue
        yield state


def pull(storage: Storage, found: list[State], into: Path) -> State:
    """Copy the files of the newest of these states that is complete into a new folder; returns that state.

    Raises RunDirError when none is.
    """
    for state in found:
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        try:
            with writing(into):
                in_parallel(lambda name, state=state: _pull(storage, state, name, into), state.files)  # type: ignore[misc]
        except DamagedFileError as error:
            logger.warning("passing over the state %s of %s: %s", state.id, storage, error)
            continue
        return state
    raise RunDirError(
        f"run.storage: {storage} holds a run, and none of its states is complete: put back what is missing, or begin "
        "anew with another URL"
    )


def _pull(storage: Storage, state: State, name: str, into: Path) -> None:
    expected, push = state.files[name]
    (storage / FILES / push).get(name, into / name, expected)


# ---- drivers --------------------------------------------------------------------------------------------------------


def take_over(storage: Storage) -> int:
    """The number of a new driver: whoever has a lower one is stopped at its next push."""
    token = uuid.uuid4().hex
    described = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %Z"), "token": token}
    for _ in range(_TRIES):
        number = 1 + _newest_driver(storage)
        name = _driver_file(number)
        # Where a storage cannot refuse to write a file twice, whoever wrote last has the number.
        written = (storage / DRIVERS).write(name, json.dumps(described), create=True)
        if written and token in ((storage / DRIVERS).read(name) or ""):
            return number
    raise StorageError(f"{storage}/{DRIVERS}: {_TRIES} others have taken over this run meanwhile: let one of them run")


def _newest_driver(storage: Storage) -> int:
    numbers = [name.removesuffix(".json") for name in (storage / DRIVERS).list()]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _driver_file(number: int) -> str:
    return f"{number:06d}.json"


def bring(storage: Storage, run_dir: Path, staying: Collection[str], say: Callable[[str], None]) -> bool:
    """Take over a run: make `run_dir`, which is there and locked, a working copy of its newest state.

    A copy that is as new, or newer, stays as it is; an older one is set aside, which is said, but for the files of the
    names `staying`. Returns whether the storage has the run. Raises RunDirError for a folder with another run in it.
    """
    driver = take_over(storage)
    found, mark = list(states(storage)), Mark.read(run_dir)
    if not found:
        if mark is None and (run_dir / METRICS).exists():
            raise RunDirError(
                f"run.dir: {run_dir} holds a run that is not in {storage}: choose another --run.name, or go on with it "
                "without run.storage"
            )
        if mark is not None and mark.state is not None:
            raise RunDirError(
                f"run.dir: {run_dir} is the working copy of a run that is not in {storage}: put run.storage back, or "
                "copy the run there first"
            )
        Mark(uuid.uuid4().hex if mark is None else mark.copy, None, driver).write(run_dir)
        return False
    if mark is None or not mark.continues(found[0]):
        held = [path for path in run_dir.iterdir() if path.name not in staying]
        if held:
            say(f"{run_dir} is older than {storage}, so it is kept as {_set_aside(held, run_dir)} and fetched anew")
        aside = run_dir.with_name(f".{run_dir.name}.fetched")
        state = pull(storage, found, aside)
        for path in sorted(aside.iterdir(), key=lambda path: path.name != CONFIG):
            os.rename(path, run_dir / path.name)
        aside.rmdir()
        # Last: without it what is here counts for nothing.
        Mark(uuid.uuid4().hex, state.id, driver).write(run_dir)
        say(f"{run_dir} is a working copy of {storage}, as it was after push {state.id}")
    else:
        Mark(mark.copy, found[0].id, driver).write(run_dir)
    return True


def _set_aside(held: Sequence[Path], run_dir: Path) -> Path:
    number = next(n for n in itertools.count(1) if not run_dir.with_name(f"{run_dir.name}.older-{n}").exists())
    aside = run_dir.with_name(f"{run_dir.name}.older-{number}")
    aside.mkdir()
    for path in sorted(held, key=lambda path: (path.name == CONFIG, path.name == MARK)):
        os.rename(path, aside / path.name)
    return aside


# ---- the run --------------------------------------------------------------------------------------------------------


class Archive:
    """The shelf of a run whose checkpoints are in a storage; a push takes the run directory along.

    Methods may be called from several threads, pushes one at a time. They raise StorageError, DiskFullError of the
    working copy's disk, and RunDirError when another driver has taken over.
    """

    def __init__(self, storage: Storage, run_dir: Path, driver: int = 0, state: State | None = None) -> None:
        """`state`: the newest one, that the run goes on from. Without the number of a `driver` it is for reading."""
        self.storage = storage
        self._run_dir = run_dir
        self._driver = driver
        self._state = state
        self._before = state  # kept whole, too
        self._pushes = 0
        self._begun: dict[int, str] = {}  # version -> name of the folder
        self._seen: dict[str, tuple[int, int, int]] = {}  # file of the run directory -> what it was like when pushed
        self._lock = threading.Lock()  # of the names

    @staticmethod
    def of(storage: Storage, run_dir: Path) -> Archive:
        """For the driver that has brought the working copy up to date."""
        mark = Mark.read(run_dir)
        if mark is None:
            raise RunDirError(f"run.dir: {run_dir} is no working copy of {storage}: its {MARK} is missing")
        archive = Archive(storage, run_dir, mark.driver, next(filter(mark.continues, states(storage)), None))
        archive._still_ours()
        return archive

    @staticmethod
    def reading(storage: Storage, run_dir: Path) -> Archive:
        return Archive(storage, run_dir, state=next(states(storage), None))

    # ---- as a shelf ----

    def found(self) -> list[Found]:
        named = {} if self._state is None else self._state.checkpoints
        places = {int(version): self.storage / CHECKPOINTS / name for version, name in named.items()}
        return [Found(version, places[version], False) for version in sorted(places, reverse=True)]

    def manifest(self, place: Storage) -> str:
        text = place.read(MANIFEST)
        if text is None:
            raise FileNotFoundError(f"{place / MANIFEST} is missing")
        return text

    def misfit(self, place: Storage, files: Files) -> str:
        """By size alone: the content is looked at by those who load it (`storage.fetch`)."""
        there = place.list()
        for name, expected in files.items():
            if name not in there:
                return f"{name} is missing"
            if there[name] != expected["bytes"]:
                return f"{name} has {there[name]} bytes, expected {expected['bytes']}"
        return ""

    def place(self, version: int) -> Storage:
        return self.storage / CHECKPOINTS / self._begun[version]

    def begin(self, version: int) -> Storage:
        with self._lock:
            self._begun[version] = f"step-{version:06d}.{self._next()}"
        return self.place(version)

    def abandon(self, version: int) -> None:
        """What has been written of it goes with the next push."""
        with self._lock:
            self._begun.pop(version, None)

    def commit(self, version: int, manifest: str, files: Files, keep: Keep) -> Storage:
        place = self.place(version)
        try:
            if problem := self.misfit(place, files):
                raise StorageError(
                    f"{place} was written, and now {problem}: look whether the storage keeps what it takes"
                )
            named = {} if self._state is None else {int(v): name for v, name in self._state.checkpoints.items()}
            named[version] = self._begun[version]

            def finish() -> dict[int, str]:
                place.write(MANIFEST, manifest)
                staying = keep(set(named), version)
                return {v: name for v, name in named.items() if v in staying}

            self._push(self._begun[version].partition(".")[2], finish)
            self._outline(version, place, manifest, files)
        finally:
            self.abandon(version)
        return place

    def _outline(self, version: int, place: Storage, manifest: str, files: Files) -> None:
        """In the working copy, for people and commands: the newest checkpoint without its weights."""
        folder = self._run_dir / CHECKPOINTS / f"step-{version:06d}"
        small = [name for name in files if name.startswith("learner/hf/") and name.endswith(".json")]
        with writing(folder):
            for old in folder.parent.glob("step-*"):
                shutil.rmtree(old)
            folder.mkdir(parents=True)
            (folder / MANIFEST).write_text(manifest)
            try:
                in_parallel(lambda name: place.get(name, folder / name, files[name]), small)
            except StorageError as error:  # nothing goes on from here
                logger.warning("%s is incomplete: %s", folder, error)

    # ---- pushes ----

    def push(self) -> None:
        """The run directory as it is, with the checkpoints that there are; nothing where there is none yet."""
        if self._state is not None:
            checkpoints = {int(v): name for v, name in self._state.checkpoints.items()}
            with self._lock:
                number = self._next()
            self._push(number, lambda: checkpoints)

    def _next(self) -> str:
        self._pushes += 1
        return f"{self._driver}.{self._pushes}"

    def _push(self, push: str, finish: Any) -> None:
        self._still_ours()
        files = self._push_files(push)
        checkpoints = finish()
        mark = Mark.read(self._run_dir)
        state = State(
            *(self._driver, int(push.partition(".")[2]), "" if mark is None else mark.copy),
            {str(version): name for version, name in checkpoints.items()},
            files,
        )
        self._still_ours()
        (self.storage / STATES).write(_state_file(state), seal({"format": FORMAT, **asdict(state)}))
        self._before, self._state = self._state, state
        if mark is not None:
            Mark(mark.copy, state.id, mark.driver).write(self._run_dir)
        try:
            self._tidy()
        except StorageError as error:  # the push stands; the next one tries again
            logger.warning("what is not needed any more stays in %s for now: %s", self.storage, error)

    def _still_ours(self) -> None:
        newest = _newest_driver(self.storage)
        if newest != self._driver:
            raise RunDirError(_overtaken(self.storage, newest))

    def _push_files(self, push: str) -> dict[str, tuple[Fingerprint, str]]:
        """What the files of the run directory are, and where. Those that have changed are written."""
        before = {} if self._state is None else dict(self._state.files)
        target, there = self.storage / FILES / push, (self.storage / FILES).list()
        pushed: dict[str, tuple[Fingerprint, str]] = {}

        def is_there(name: str) -> bool:
            return name in before and there.get(f"{before[name][1]}/{name}") == before[name][0]["bytes"]

        with scratch() as folder:

            def one(name: str) -> None:
                path = self._run_dir / name
                try:
                    met = path.stat()
                    like = (met.st_mtime_ns, met.st_size, met.st_ino)
                    if self._seen.get(name) == like and is_there(name):
                        pushed[name] = before[name]
                        return
                    copy = folder / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    with writing(copy):
                        shutil.copyfile(path, copy)  # the run goes on writing to it
                except FileNotFoundError:  # it is not needed any more
                    return
                send(name, copy)
                self._seen[name] = like

            def send(name: str, copy: Path) -> None:
                found = fingerprint(copy)
                if is_there(name) and before[name][0] == found:
                    pushed[name] = before[name]
                else:
                    target.put(copy, name)
                    pushed[name] = (found, push)
                copy.unlink()

            if (self._run_dir / LEDGER_FILE).is_file():  # first, so that the groups that it knows of are there
                _copy_ledger(self._run_dir / LEDGER_FILE, folder / LEDGER_FILE)
                send(LEDGER_FILE, folder / LEDGER_FILE)
            in_parallel(one, _names(self._run_dir))
        return dict(sorted(pushed.items()))

    def _tidy(self) -> None:
        """Take away what neither of the newest two states names, but for what later drivers have."""
        keep: set[str] = set()
        for state in (self._state, self._before):
            if state is not None:
                keep.add(f"{STATES}/{_state_file(state)}")
                keep |= {f"{FILES}/{push}/{name}" for name, (_, push) in state.files.items()}
                keep |= {f"{CHECKPOINTS}/{name}/" for name in state.checkpoints.values()}
        with self._lock:
            keep |= {f"{CHECKPOINTS}/{name}/" for name in self._begun.values()}
        gone = [name for name in self.storage.list() if self._is_old(name) and not {name, _folder(name)} & keep]
        self.storage.delete(gone)

    def _is_old(self, name: str) -> bool:
        """Whether it is of this driver or one before; strange files are left alone."""
        found = re.match(rf"{FILES}/(\d+)\.|{STATES}/(\d+)\.|{CHECKPOINTS}/step-\d+\.(\d+)\.", name)
        return found is not None and int(next(filter(None, found.groups()))) <= self._driver


def _overtaken(storage: Storage, driver: int) -> str:
    text = (storage / DRIVERS).read(_driver_file(driver)) or "{}"
    try:
        who = json.loads(text)
    except ValueError:
        who = {}
    return (
        f"run.storage: {storage} has been taken over by another driver, number {driver} (host {who.get('host', '?')}, "
        f"process {who.get('pid', '?')}, since {who.get('since', '?')}): only one may work on a run. What this one has "
        "done since its last checkpoint is in its run.dir alone"
    )


def _state_file(state: State) -> str:
    return f"{state.driver:06d}.{state.push:06d}.json"


def _folder(name: str) -> str:
    """The first two parts of a path, as the folder of a checkpoint is named."""
    return "/".join(name.split("/")[:2]) + "/"


def _names(run_dir: Path) -> list[str]:
    """The files of a run directory that are pushed as they are."""
    files = (p for p in run_dir.rglob("*") if p.is_file() and not p.is_symlink())
    names = (p.relative_to(run_dir).as_posix() for p in files)
    return sorted(name for name in names if not _NOT_PUSHED.fullmatch(name))


def _copy_ledger(path: Path, copy: Path) -> None:
    """As it is at one instant, whatever is written meanwhile."""
    try:
        with (
            writing(copy),
            closing(sqlite3.connect(path)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.Error as error:
        raise ledger_error(path, error, "read") from error
