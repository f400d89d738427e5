"""The run directory: whose it is, who uses it, and that a user's mistake leaves no half of one behind."""

from __future__ import annotations

import fcntl
import shutil
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from rlsys.config.identity import check_same_run
from rlsys.config.loading import dump_config, load_config
from rlsys.config.models import Config
from rlsys.config.sizes import SIZES
from rlsys.driver.archive import MARK, Archive, bring, states
from rlsys.driver.checkpoints import Checkpoints
from rlsys.errors import ConfigError, RunDirError, UserError
from rlsys.storage import Storage
from rlsys.trackers.jsonl import METRICS

CONFIG, LOCK, SUPERVISE_LOG = "config.yaml", "run.lock", "supervise.log"


@contextmanager
def open_run_dir(config: Config) -> Iterator[Path]:
    """The run's directory, locked against other processes, with the resolved config in it.

    With `run.storage` it is a working copy: it is brought up to date first, and this process takes over the run.
    A directory of the same run is gone on with, unless `run.resume` is never. One of a run that ended before anything
    was measured is begun anew, whatever its config was. A directory that this call made is removed again when a
    UserError or an interrupt ends the run before its first step. Raises RunDirError.
    """
    path = Path(config.run.dir)
    _check_contents(path, config)
    fresh = not (path / CONFIG).exists()
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a")
    except OSError as error:
        raise RunDirError(f"run.dir: {path} cannot be made or written to: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunDirError(
                f"run.dir: {path} is in use by another rlsys process; end that one, or give this run a directory of "
                "its own (--run.name or --run.dir)"
            ) from None
        _check_contents(path, config)  # another process may have come in between
        try:
            if config.run.storage is not None and _bring(path, config):
                _check_contents(path, config)
            elif _is_barren(path):
                for entry in path.iterdir():
                    if entry.name not in (LOCK, SUPERVISE_LOG, SIZES, MARK):
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            dump_config(config, path / CONFIG)
            yield path
        except (UserError, KeyboardInterrupt, CancelledError):
            if fresh and not (path / METRICS).exists():
                shutil.rmtree(made[-1] if made else path)
            raise


def _is_barren(path: Path) -> bool:
    """A run was begun here and failed before anything was measured."""
    return (path / CONFIG).is_file() and not (path / METRICS).exists()


def _check_contents(path: Path, config: Config) -> None:
    if path.exists() and not path.is_dir():
        raise RunDirError(f"run.dir: {path} is a file")
    if config.run.storage is None and (path / MARK).exists():
        raise RunDirError(
            f"run.dir: {path} is the working copy of a run whose checkpoints are in a storage: give run.storage as it "
            "was, or choose another --run.name"
        )
    if _is_barren(path):
        return
    if (path / CONFIG).is_file():
        if config.run.resume == "never":
            raise RunDirError(
                f"run.dir: {path} holds a run already, and run.resume is never; remove it, choose another --run.name, "
                "or go on with it by --run.resume auto"
            )
        check_same_run(config, path / CONFIG)
    elif path.is_dir() and (foreign := sorted(p.name for p in path.iterdir() if p.name not in (LOCK, MARK))):
        raise RunDirError(
            f"run.dir: {path} is no run directory: it has no {CONFIG}, but {', '.join(foreign[:5])}; choose another one"
        )


# ---- a run in a storage --------------------------------------------------------------------------------------------


def storage_of(config: Config) -> Storage | None:
    """Where the run is stored; None: in its directory alone."""
    if config.run.storage is None:
        return None
    return Storage(config.run.storage, config.run.storage_timeout_s)


def archive_of(config: Config, run_dir: Path) -> Archive | None:
    """For the driver, in an open run directory."""
    storage = storage_of(config)
    return None if storage is None else Archive.of(storage, run_dir)


def checkpoints_of(run_dir: Path) -> Checkpoints:
    """The checkpoints of a run, for reading. Raises RunDirError for one whose config cannot be read."""
    storage = None
    if (run_dir / MARK).is_file():
        try:
            storage = storage_of(load_config(run_dir / CONFIG))
        except ConfigError as error:
            raise RunDirError(f"{run_dir / CONFIG} does not say where the checkpoints are:\n{error}") from error
    shelf = None if storage is None else Archive.reading(storage, run_dir)
    return Checkpoints(run_dir / "checkpoints", shelf=shelf)


def _bring(path: Path, config: Config) -> bool:
    storage = storage_of(config)
    assert storage is not None
    if config.run.resume == "never" and next(states(storage), None) is not None:
        raise RunDirError(
            f"run.storage: {storage} holds a run already, and run.resume is never; choose another URL, or go on with "
            "it by --run.resume auto"
        )
    return bring(storage, path, (LOCK, SUPERVISE_LOG), lambda text: typer.echo(f"rlsys: {text}", err=True))
