"""Checkpoints: one directory per step, written aside and renamed, covered by one manifest.

    RUN/checkpoints/step-000050/manifest.json   what is in it: size and SHA-256 of every file, and where the run stood
    RUN/checkpoints/step-000050/learner/...     whatever the learner saved
    RUN/checkpoints/step-000050/reference/...   the reference, where it moves (reference.update)
    RUN/checkpoints/ratings.json                held-out accuracies by step

A directory without a manifest that fits its files is not a checkpoint. One with such a manifest is, also under the name
that it is written under:

    .step-000050.tmp    being written, or complete and not renamed yet
    .step-000050.gone   being removed

So an older checkpoint of the same step is removed when the new one is complete and on disk, and at every instant a
crash (or a loss of power) leaves the old one, the new one, or both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlsys.durable import replace_text, sync, sync_tree, writing

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RATINGS = "ratings.json"
LEARNER = "learner"
MODEL = "hf"
REFERENCE = "reference"
FORMAT = 2

_NAME = re.compile(r"step-(\d+)|\.step-(\d+)\.tmp")


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
    path: Path
    manifest: Manifest

    @property
    def learner(self) -> Path:
        return self.path / LEARNER

    @property
    def model(self) -> Path:
        """The policy as an ordinary Hugging Face checkpoint."""
        return self.path / LEARNER / MODEL

    @property
    def reference(self) -> Path:
        return self.path / REFERENCE


def kept(versions: Collection[int], ratings: Mapping[int, float], last: int, best: int, every: int) -> set[int]:
    """Of the `versions` there are, those to keep: the `last` newest ones, the `best` rated highest (of equals the
    newer), and the multiples of `every` (0: none)."""
    newest = sorted(versions, reverse=True)[:last]
    rated = sorted((v for v in versions if v in ratings), key=lambda v: (ratings[v], v), reverse=True)[:best]
    return {*newest, *rated, *(v for v in versions if every and v % every == 0)}


class Checkpoints:
    """The checkpoints of a run. Reading (`newest`, `versions`, `check`, `ratings`) changes nothing on disk.

    Methods may be called from several threads. Those that write raise DiskFullError.
    """

    def __init__(self, directory: Path, keep_last: int = 2, keep_best: int = 1, keep_every: int = 0) -> None:
        self.directory = directory
        self._keep = (keep_last, keep_best, keep_every)
        self._lock = threading.Lock()  # of everything below, and of what bears the name of a checkpoint
        self._begun: set[int] = set()  # by this process, and not committed yet
        self._damaged: set[int] = set()  # passed over by `newest`
        self._ratings: dict[int, float] | None = None

    # ---- writing ----

    def begin(self, version: int) -> Path:
        """An empty directory for the learner to save into, not a checkpoint until `commit`."""
        aside = self._aside(version)
        with self._lock, writing(aside):
            self._mend()
            shutil.rmtree(aside, ignore_errors=True)
            self._begun.add(version)
            (aside / LEARNER).mkdir(parents=True)
        return aside / LEARNER

    def place(self, version: int, part: str) -> Path:
        """Where another part of the checkpoint that was begun is saved."""
        return self._aside(version) / part

    def abandon(self, version: int) -> None:
        """Remove what has been begun and cannot be completed, so that it does not hold the space."""
        with self._lock:
            self._begun.discard(version)
            shutil.rmtree(self._aside(version), ignore_errors=True)

    def commit(self, manifest: Manifest) -> Path:
        """Make it a checkpoint, in the place of one of the same step; then remove those that are not to be kept.

        What cannot be completed is removed again.
        """
        aside = self._aside(manifest.version)
        try:
            with writing(aside):
                files = {str(p.relative_to(aside)): _fingerprint(p) for p in sorted(aside.rglob("*")) if p.is_file()}
                (aside / MANIFEST).write_text(_seal({"format": FORMAT, **asdict(manifest), "files": files}))
                sync_tree(aside)
                sync(self.directory)
                sync(self.directory.parent)
        except BaseException:
            self.abandon(manifest.version)
            raise
        with self._lock, writing(self.directory):
            self._begun.discard(manifest.version)
            final = self._rename(aside, manifest.version)
            self._prune()
        return final

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

    # ---- reading ----

    def newest(self) -> Checkpoint | None:
        """The newest valid checkpoint. Those that are not valid are passed over with a message."""
        passed_over = False
        for path in self._places():
            problem, manifest = _verify(path)
            if manifest is not None:
                return Checkpoint(path, manifest)
            if not path.name.startswith("."):
                logger.warning("passing over the checkpoint %s: %s", path, problem)
                passed_over = True
                self._damaged.add(_version(path))
        if passed_over:
            logger.warning("no checkpoint in %s is valid: there is nothing to go on from", self.directory)
        return None

    def versions(self) -> list[int]:
        """Those that have a checkpoint, rising; `check` says whether it is valid."""
        named = (p for p in self._places() if not p.name.startswith(".") or (p / MANIFEST).is_file())
        return sorted({_version(path) for path in named})

    def check(self, version: int) -> tuple[str, Checkpoint | None]:
        """The checkpoint of a version, or what is wrong with it."""
        problem = "there is none"
        for path in self._places():
            if _version(path) == version:
                problem, manifest = _verify(path)
                if manifest is not None:
                    return "", Checkpoint(path, manifest)
        return problem, None

    def ratings(self) -> dict[int, float]:
        """Held-out accuracy by version, also of versions without a checkpoint."""
        with self._lock:
            return dict(self._read_ratings())

    # ---- places ----

    def _aside(self, version: int) -> Path:
        return self.directory / f".step-{version:06d}.tmp"

    def _final(self, version: int) -> Path:
        return self.directory / f"step-{version:06d}"

    def _places(self) -> list[Path]:
        """Where a checkpoint may be: newest first, those in place before those of the same step written aside."""
        found = [p for p in self.directory.glob("*") if _NAME.fullmatch(p.name)]
        ours = [p for p in found if not (p.name.startswith(".") and _version(p) in self._begun)]
        return sorted(ours, key=lambda p: (-_version(p), p.name.startswith(".")))

    def _rename(self, aside: Path, version: int) -> Path:
        """Put what is complete in its place."""
        final = self._final(version)
        self._damaged.discard(version)
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
        for path in self._places():
            if path.name.startswith("."):
                if _verify(path)[1] is None:
                    shutil.rmtree(path)
                else:
                    self._rename(path, _version(path))

    def _prune(self) -> None:
        """Damaged ones do not count. Those of later steps stay until the run gets there, the others go."""
        places = {_version(path): path for path in self._places() if not path.name.startswith(".")}
        good = places.keys() - self._damaged
        keep = kept(good, self._read_ratings(), *self._keep)
        for version, path in places.items():
            if version not in keep and not (version in self._damaged and version > max(good)):
                self._damaged.discard(version)
                shutil.rmtree(self._set_aside(path))

    # ---- ratings ----

    def _read_ratings(self) -> dict[int, float]:
        if self._ratings is None:
            self._ratings = {}
            path = self.directory / RATINGS
            if path.is_file():
                try:
                    content = _unseal(path.read_text())
                    self._ratings = {int(version): accuracy for version, accuracy in content["accuracy"].items()}
                except (OSError, ValueError, KeyError) as error:
                    logger.warning("passing over %s, by which the best checkpoints are kept: %s", path, error)
        return self._ratings

    def _write_ratings(self, ratings: dict[int, float]) -> None:
        path = self.directory / RATINGS
        with writing(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            replace_text(path, _seal({"accuracy": ratings}))
        self._ratings = ratings


def _version(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1] or found[2])


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _seal(content: Mapping[str, Any]) -> str:
    """JSON with a checksum of itself."""
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, "sha256": _digest(plain)}, indent=1)


def _unseal(text: str) -> dict[str, Any]:
    """What was sealed. Raises ValueError or KeyError when it is not whole."""
    content: dict[str, Any] = json.loads(text)
    if content.pop("sha256") != _digest(content):
        raise ValueError("its content has changed")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verify(path: Path) -> tuple[str, Manifest | None]:
    """The manifest when everything fits, else what is wrong."""
    try:
        text = (path / MANIFEST).read_text()
        if json.loads(text)["format"] != FORMAT:
            return f"its {MANIFEST} is of another format", None
        content = _unseal(text)
        del content["format"]
        files = content.pop("files")
        manifest = Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})", None
    if manifest.version != _version(path):
        return f"its {MANIFEST} is of step {manifest.version}", None
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", None
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}", None
        if _fingerprint(file) != expected:
            return f"the content of {name} has changed", None
    return "", manifest
