"""Checkpoints: one directory per step, written aside and renamed, covered by one manifest.

    RUN/checkpoints/step-000050/manifest.json   what is in it: size and SHA-256 of every file, and where the run stood
    RUN/checkpoints/step-000050/learner/...     whatever the learner saved
    RUN/checkpoints/step-000050/reference/...   the reference, where it moves (reference.update)

A directory without a manifest that fits its files is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LEARNER = "learner"
REFERENCE = "reference"
FORMAT = 1


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
    def reference(self) -> Path:
        return self.path / REFERENCE


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def begin(self, version: int) -> Path:
        """An empty directory for the learner to save into, not a checkpoint until `commit`."""
        aside = self._aside(version)
        shutil.rmtree(aside, ignore_errors=True)
        (aside / LEARNER).mkdir(parents=True)
        return aside / LEARNER

    def place(self, version: int, part: str) -> Path:
        """Where another part of the checkpoint that was begun is saved."""
        return self._aside(version) / part

    def commit(self, manifest: Manifest) -> Path:
        """Make it a checkpoint, and remove all but the newest ones."""
        aside = self._aside(manifest.version)
        files = {str(p.relative_to(aside)): _fingerprint(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        text = json.dumps({"format": FORMAT, **asdict(manifest), "files": files}, indent=1)
        with (aside / MANIFEST).open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        final = self.directory / f"step-{manifest.version:06d}"
        shutil.rmtree(final, ignore_errors=True)  # one of the same step, found invalid or being redone
        aside.rename(final)
        for old in [*self._paths()[self.keep :], *self.directory.glob(".step-*.tmp")]:
            shutil.rmtree(old)
        return final

    def newest(self) -> Checkpoint | None:
        """The newest valid checkpoint. Those that are not valid are passed over with a message."""
        for path in self._paths():
            problem, manifest = _verify(path)
            if manifest is not None:
                return Checkpoint(path, manifest)
            logger.warning("passing over the checkpoint %s: %s", path, problem)
        return None

    def versions(self) -> list[int]:
        """Those that have a checkpoint, rising; `check` says whether it is valid."""
        return sorted(int(path.name.removeprefix("step-")) for path in self._paths())

    def check(self, version: int) -> tuple[str, Checkpoint | None]:
        """The checkpoint of a version, or what is wrong with it."""
        path = self.directory / f"step-{version:06d}"
        problem, manifest = _verify(path)
        return problem, None if manifest is None else Checkpoint(path, manifest)

    def _aside(self, version: int) -> Path:
        return self.directory / f".step-{version:06d}.tmp"

    def _paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self.directory.glob("step-*"), reverse=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path) -> tuple[str, Manifest | None]:
    """The manifest when everything fits, else what is wrong."""
    try:
        content = json.loads((path / MANIFEST).read_text())
        if content.pop("format") != FORMAT:
            return f"its {MANIFEST} is of another format", None
        files = content.pop("files")
        manifest = Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})", None
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", None
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}", None
        if _fingerprint(file) != expected:
            return f"the content of {name} has changed", None
    return "", manifest
