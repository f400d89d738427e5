"""`rlsys export`: the model of a checkpoint, for everything that reads Hugging Face folders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console

from rlsys.cli.rundir import checkpoints_of
from rlsys.driver.checkpoints import Checkpoint, Checkpoints
from rlsys.durable import sync, sync_tree, writing
from rlsys.errors import ConfigError, DataError, RunDirError
from rlsys.storage import Storage, readable


def export(run_dir: Path, target: Path, step: int | None = None, best: bool = False) -> None:
    """Copy the model of the newest checkpoint, of that of `step`, or of the best one, and say what was written.

    The folder is there whole or not at all. Raises ConfigError, RunDirError, DataError, DiskFullError.
    """
    if step is not None and best:
        raise ConfigError("--step and --best name a checkpoint each: give one of them")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} is there already, and not an empty folder: choose another DIR")
    if not run_dir.is_dir():
        raise RunDirError(f"{run_dir}: no such run directory")
    checkpoints = checkpoints_of(run_dir)
    checkpoint = _newest(checkpoints) if step is None and not best else _chosen(checkpoints, step)
    if not (checkpoint.model.files if isinstance(checkpoint.model, Storage) else checkpoint.model.is_dir()):
        raise DataError(f"{checkpoint.path} holds no model: there is no folder {checkpoint.model}")
    _copy(checkpoint, target)
    version = checkpoint.manifest.version
    accuracy = checkpoints.ratings().get(version)
    rated = "" if accuracy is None else f", held-out accuracy {accuracy:.1%}"
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    Console(highlight=False).print(f"{target}: the model of step {version} ({size / 1e6:,.1f} MB{rated})")


def _newest(checkpoints: Checkpoints) -> Checkpoint:
    checkpoint = checkpoints.newest()
    if checkpoint is None:
        raise DataError(f"{checkpoints.directory} holds no {'valid ' * bool(checkpoints.versions())}checkpoint")
    return checkpoint


def _chosen(checkpoints: Checkpoints, step: int | None) -> Checkpoint:
    """That of `step`, or the best one where it is None."""
    versions = checkpoints.versions()
    if not versions:
        raise DataError(f"{checkpoints.directory} holds no checkpoint")
    kept = f"the checkpoints that are kept are of step {', '.join(map(str, versions))}"
    if step is None:
        rated = {v: accuracy for v, accuracy in checkpoints.ratings().items() if v in versions}
        if not rated:
            raise DataError(f"--best: no checkpoint has been evaluated (eval.every); {kept}")
        step = max(rated, key=lambda v: (rated[v], v))
    if step not in versions:
        raise DataError(f"--step {step}: {kept} (checkpoint.keep_last, keep_best, keep_every)")
    problem, checkpoint = checkpoints.check(step)
    if checkpoint is None:
        raise DataError(f"the checkpoint of step {step} in {checkpoints.directory} is damaged: {problem}; {kept}")
    return checkpoint


def _copy(checkpoint: Checkpoint, target: Path) -> None:
    """Aside, onto the disk, then renamed."""
    target = target.absolute()
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(target):
            aside.mkdir(parents=True)
            with readable(checkpoint.model) as model:
                for path in sorted(model.rglob("*")):
                    copy = aside / path.relative_to(model)
                    copy.mkdir() if path.is_dir() else shutil.copyfile(path, copy)
            sync_tree(aside)
            os.rename(aside, target)
            sync(target.parent)
    except OSError as error:  # a run that is going on may have removed its checkpoint meanwhile
        raise DataError(f"{checkpoint.model} could not be copied to {target}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
