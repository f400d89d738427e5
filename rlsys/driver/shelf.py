"""Where the checkpoints of a run are: in a folder that all nodes see (here), or in a storage (`archive`).

In a folder, a checkpoint is written aside and renamed:

    .step-000050.tmp    being written, or complete and not renamed yet
    .step-000050.gone   being removed

A directory with a manifest that fits its files is a checkpoint, also under the first of these names. So an older one of
the same step is removed when the new one is complete and on disk, and at every instant a crash (or a loss of power)
leaves the old one, the new one, or both.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlsys.durable import Files, fingerprint, seal, sync, sync_tree, unseal, writing
from rlsys.errors import RunDirError
from rlsys.storage import Place

MANIFEST = "manifest.json"
FORMAT = 2

_NAME = re.compile(r"step-(\d+)|\.step-(\d+)\.tmp")

Keep = Callable[[set[int], int], set[int]]  # of the versions there are, with the new one: those that stay


class Found(NamedTuple):
    """A place where a checkpoint may be. `aside`: it has not got its name yet, and may never have been complete."""

    version: int
    place: Any  # Place
    aside: bool


class Shelf(Protocol):
    """The methods may be called from several threads."""

    def found(self) -> list[Found]:
        """Newest first; in its place before those of the same step written aside."""
        ...

    def manifest(self, place: Any) -> str:
        """Raises OSError where there is none."""
        ...

    def misfit(self, place: Any, files: Files) -> str:
        """What is wrong with its files, as far as can be told from here; empty: nothing."""
        ...

    def place(self, version: int) -> Place:
        """Where the checkpoint that was begun last is being written."""
        ...

    def begin(self, version: int) -> Place:
        """Somewhere empty."""
        ...

    def abandon(self, version: int) -> None:
        """It will not be completed."""
        ...

    def commit(self, version: int, manifest: str, files: Files, keep: Keep) -> Place:
        """Make what was begun a checkpoint, in the place of one of the same step, and take away what is not kept."""
        ...


class Folder:
    """A shelf that is a folder. Methods that write raise DiskFullError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()  # of what bears the name of a checkpoint, and of the next
        self._begun: set[int] = set()  # by this process, and not committed yet

    def found(self) -> list[Found]:
        found = [p for p in self.directory.glob("*") if _NAME.fullmatch(p.name)]
        places = [Found(_version(p), p, p.name.startswith(".")) for p in found]
        ours = [p for p in places if not (p.aside and p.version in self._begun)]
        return sorted(ours, key=lambda p: (-p.version, p.aside))

    def manifest(self, place: Path) -> str:
        return (place / MANIFEST).read_text()

    def misfit(self, place: Path, files: Files) -> str:
        if problem := _missing(place, files):
            return problem
        changed = (name for name, expected in files.items() if fingerprint(place / name) != expected)
        return next((f"the content of {name} has changed" for name in changed), "")

    def place(self, version: int) -> Path:
        return self.directory / f".step-{version:06d}.tmp"

    def begin(self, version: int) -> Path:
        aside = self.place(version)
        with self._lock, writing(aside):
            self._mend()
            shutil.rmtree(aside, ignore_errors=True)
            self._begun.add(version)
            aside.mkdir(parents=True)
        return aside

    def abandon(self, version: int) -> None:
        """So that it does not hold the space."""
        with self._lock:
            self._begun.discard(version)
            shutil.rmtree(self.place(version), ignore_errors=True)

    def commit(self, version: int, manifest: str, files: Files, keep: Keep) -> Path:
        """Raises RunDirError for files that are not here: those who wrote them see another folder."""
        aside = self.place(version)
        try:
            with writing(aside):
                if problem := _missing(aside, files):
                    raise RunDirError(
                        f"a checkpoint was written to {aside}, and here {problem}: run.dir has to be on storage that "
                        "all nodes share, or run.storage has to be given"
                    )
                (aside / MANIFEST).write_text(manifest)
                sync_tree(aside)
                sync(self.directory)
                sync(self.directory.parent)
        except BaseException:
            self.abandon(version)
            raise
        with self._lock, writing(self.directory):
            self._begun.discard(version)
            final = self._rename(aside, version)
            places = {found.version: found.place for found in self.found() if not found.aside}
            for gone in places.keys() - keep(set(places), version):
                shutil.rmtree(self._set_aside(places[gone]))
        return final

    def _rename(self, aside: Path, version: int) -> Path:
        """Put what is complete in its place."""
        final = self.directory / f"step-{version:06d}"
        gone = self._set_aside(final) if final.exists() else None
        os.rename(aside, final)
        sync(self.directory)
        if gone is not None:
            shutil.rmtree(gone)
        return final

    def _set_aside(self, path: Path) -> Path:
        """Rename what is to be removed, so that no half of it bears the name of a checkpoint."""
        gone = self.directory / f".{path.name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        return gone

    def _mend(self) -> None:
        """Finish what an earlier process was about when it ended."""
        for gone in self.directory.glob(".step-*.gone"):
            shutil.rmtree(gone)
        for found in self.found():
            if found.aside:
                if self._complete(found):
                    self._rename(found.place, found.version)
                else:
                    shutil.rmtree(found.place)

    def _complete(self, found: Found) -> bool:
        return examine(self, found)[1] is not None


def sealed(content: dict[str, Any], files: Files) -> str:
    """The text of a manifest."""
    return seal({"format": FORMAT, **content, "files": files})


def examine(shelf: Shelf, found: Found) -> tuple[str, dict[str, Any] | None]:
    """What the manifest says, `files` included, when everything fits; else what is wrong."""
    try:
        text = shelf.manifest(found.place)
        if json.loads(text)["format"] != FORMAT:
            return f"its {MANIFEST} is of another format", None
        content = unseal(text)
        del content["format"]
        files: Files = content["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})", None
    if content.get("version") != found.version:
        return f"its {MANIFEST} is of step {content.get('version')}", None
    problem = shelf.misfit(found.place, files)
    return problem, None if problem else content


def _missing(folder: Path, files: Files) -> str:
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, expected {expected['bytes']}"
    return ""


def _version(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1] or found[2])
