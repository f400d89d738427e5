"""Files that outlive a loss of power, show damage, and a full disk told as what it is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from rlsys.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SQLITE_FULL = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_SHMSIZE,
)  # the second: no room for the file of the WAL's index
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers say it in their text only


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskFullError, which names `path`, for whatever a full disk makes of the block."""
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise no_room(path, error) from error


def no_room(path: Path | str, error: BaseException) -> DiskFullError:
    return DiskFullError(
        f"{path} cannot be written: the disk is full, or a quota is used up ({error}). What was good before still is: "
        "make room, and the same command goes on"
    )


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an error of the system, SQLite or a library in Rust means."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) in _SQLITE_FULL
    found = _RUST.search(str(error))
    return found is not None and int(found[1]) in _FULL


def sync(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """`sync` of everything below a folder, and then of the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it has its old content or the new one at any time, also after a loss of power."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.rename(aside, path)
    sync(path.parent)


# ---- what shows damage ----------------------------------------------------------------------------------------------


class Fingerprint(TypedDict):
    """Of a file."""

    bytes: int
    sha256: str


Files = Mapping[str, Fingerprint]  # by name below a folder, with slashes


def fingerprint(path: Path) -> Fingerprint:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fingerprints(folder: Path) -> dict[str, Fingerprint]:
    """Of every file below a folder."""
    return {p.relative_to(folder).as_posix(): fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def below(files: Files, part: str) -> dict[str, Fingerprint]:
    """Those in a folder, by their names below it."""
    return {name.removeprefix(f"{part}/"): found for name, found in files.items() if name.startswith(f"{part}/")}


def seal(content: Mapping[str, Any]) -> str:
    """JSON with a checksum of itself."""
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, "sha256": _digest(plain)}, indent=1)


def unseal(text: str) -> dict[str, Any]:
    """What was sealed. Raises ValueError or KeyError when it is not whole."""
    content: dict[str, Any] = json.loads(text)
    if content.pop("sha256") != _digest(content):
        raise ValueError("its content has changed")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
