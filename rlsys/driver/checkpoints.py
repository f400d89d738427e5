"""Checkpoints: one directory per step, covered by one manifest, on a shelf: a folder, or a storage.

    RUN/checkpoints/step-000050/manifest.json   what is in it: size and SHA-256 of every file, and where the run stood
    RUN/checkpoints/step-000050/learner/...     whatever the learner saved
    RUN/checkpoints/step-000050/reference/...   the reference, where it moves (reference.update)
    RUN/checkpoints/ratings.json                held-out accuracies by step

A directory without a manifest that fits its files is not a checkpoint. `shelf` and `archive` say how one comes to its
place whole.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlsys.driver.shelf import MANIFEST, Folder, Found, Shelf, examine, sealed
from rlsys.durable import Files, replace_text, seal, unseal, writing
from rlsys.storage import Place, Storage

__all__ = ["LEARNER", "MANIFEST", "MODEL", "REFERENCE", "Checkpoint", "Checkpoints", "Manifest", "kept"]

logger = logging.getLogger(__name__)

RATINGS = "ratings.json"
LEARNER = "learner"
MODEL = "hf"
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where the run stood after the step that made `version`.

    `position` is the ledger's at the end of that step; `next_index` the next prompt that would have been drawn;
    `buffered` the prompts that were complete and waiting; `totals` the sums for the summary;
    `drawing` the memory of what chooses the prompts.
    """

    version: int
    position: int
    next_index: int
    buffered: Sequence[str]
    seed: int
    config: str
    totals: Mapping[str, Any]
    drawing: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`path` is a folder, or a place in a storage that knows its files."""

    path: Any  # Place
    manifest: Manifest

    @property
    def learner(self) -> Any:
        return self.path / LEARNER

    @property
    def model(self) -> Any:
        """The policy as an ordinary Hugging Face checkpoint."""
        return self.path / LEARNER / MODEL

    @property
    def reference(self) -> Any:
        return self.path / REFERENCE


def kept(versions: Collection[int], ratings: Mapping[int, float], last: int, best: int, every: int) -> set[int]:
    """Of the `versions` there are, those to keep: the `last` newest ones, the `best` rated highest (of equals the
    newer), and the multiples of `every` (0: none)."""
    newest = sorted(versions, reverse=True)[:last]
    rated = sorted((v for v in versions if v in ratings), key=lambda v: (ratings[v], v), reverse=True)[:best]
    return {*newest, *rated, *(v for v in versions if every and v % every == 0)}


class Checkpoints:
    """The checkpoints of a run. Reading (`newest`, `versions`, `check`, `ratings`) changes nothing on disk.

    Methods may be called from several threads. Those that write raise DiskFullError; those of a storage StorageError.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every: int = 0,
        shelf: Shelf | None = None,
    ) -> None:
        """`directory` has the ratings, and without another `shelf` the checkpoints, too."""
        self.directory = directory
        self._shelf = shelf or Folder(directory)
        self._keep = (keep_last, keep_best, keep_every)
        self._lock = threading.Lock()  # of everything below
        self._damaged: dict[int, str] = {}  # passed over, and why
        self._refused: dict[int, str] = {}  # by those who loaded them
        self._ratings: dict[int, float] | None = None

    # ---- writing ----

    def begin(self, version: int) -> Any:
        """Somewhere empty for the learner to save into, not a checkpoint until `commit`."""
        return self._shelf.begin(version) / LEARNER

    def place(self, version: int, part: str) -> Any:
        """Where another part of the checkpoint that was begun is saved."""
        return self._shelf.place(version) / part

    def abandon(self, version: int) -> None:
        """What has been begun cannot be completed."""
        self._shelf.abandon(version)

    def commit(self, manifest: Manifest, files: Files) -> Place:
        """Make it a checkpoint of these files, in the place of one of the same step; then remove those that are not to
        be kept.

        What cannot be completed is given up.
        """
        return self._shelf.commit(manifest.version, sealed(asdict(manifest), files), files, self._staying)

    def rate(self, version: int, accuracy: float) -> None:
        """Remember the held-out accuracy of a version, whether it has a checkpoint yet or not.

        A version that is rated again has the new accuracy.
        """
        with self._lock:
            self._write_ratings({**self._read_ratings(), version: accuracy})

    def forget_after(self, version: int) -> None:
        """The run goes on from `version`: what was rated later will be other weights."""
        with self._lock:
            old = self._read_ratings()
            new = {rated: accuracy for rated, accuracy in old.items() if rated <= version}
            if new != old:
                self._write_ratings(new)

    def pass_over(self, version: int, problem: str) -> None:
        """Whoever loaded it found that it is damaged."""
        self._refused[version] = problem

    # ---- reading ----

    def newest(self) -> Checkpoint | None:
        """The newest valid checkpoint. Those that are not valid are passed over with a message."""
        passed_over = False
        for found in self._shelf.found():
            problem, checkpoint = self._look(found)
            if checkpoint is not None:
                return checkpoint
            if not found.aside:
                logger.warning("passing over the checkpoint %s: %s", found.place, problem)
                passed_over = True
                self._damaged[found.version] = problem
        if passed_over:
            logger.warning("no checkpoint in %s is valid: there is nothing to go on from", self.directory)
        return None

    def versions(self) -> list[int]:
        """Those that have a checkpoint, rising; `check` says whether it is valid."""
        named = (f for f in self._shelf.found() if not f.aside or (f.place / MANIFEST).is_file())
        return sorted({found.version for found in named})

    def check(self, version: int) -> tuple[str, Checkpoint | None]:
        """The checkpoint of a version, or what is wrong with it."""
        problem = "there is none"
        for found in self._shelf.found():
            if found.version == version:
                problem, checkpoint = self._look(found)
                if checkpoint is not None:
                    return "", checkpoint
        return problem, None

    def ratings(self) -> dict[int, float]:
        """Held-out accuracy by version, also of versions without a checkpoint."""
        with self._lock:
            return dict(self._read_ratings())

    def _look(self, found: Found) -> tuple[str, Checkpoint | None]:
        if found.version in self._refused:
            return self._refused[found.version], None
        problem, content = examine(self._shelf, found)
        if content is None:
            return problem, None
        files = content.pop("files")
        try:
            manifest = Manifest(**content)
        except TypeError as error:
            return f"its {MANIFEST} cannot be read ({error})", None
        place = found.place
        if isinstance(place, Storage):
            place = Storage(place.url, place.timeout_s, files)
        return "", Checkpoint(place, manifest)

    # ---- which are kept ----

    def _staying(self, versions: set[int], new: int) -> set[int]:
        """Damaged ones do not count. Those of later steps stay until the run gets there, the others go."""
        with self._lock:
            self._damaged.pop(new, None)
            self._refused.pop(new, None)
            damaged = versions & (self._damaged.keys() | self._refused.keys())
            good = versions - damaged
            staying = kept(good, self._read_ratings(), *self._keep) | {v for v in damaged if v > max(good)}
            for version in versions - staying:
                self._damaged.pop(version, None)
                self._refused.pop(version, None)
            return staying

    # ---- ratings ----

    def _read_ratings(self) -> dict[int, float]:
        if self._ratings is None:
            self._ratings = {}
            path = self.directory / RATINGS
            if path.is_file():
                try:
                    content = unseal(path.read_text())
                    self._ratings = {int(version): accuracy for version, accuracy in content["accuracy"].items()}
                except (OSError, ValueError, KeyError) as error:
                    logger.warning("passing over %s, by which the best checkpoints are kept: %s", path, error)
        return self._ratings

    def _write_ratings(self, ratings: dict[int, float]) -> None:
        path = self.directory / RATINGS
        with writing(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            replace_text(path, seal({"accuracy": ratings}))
        self._ratings = ratings
