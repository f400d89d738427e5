"""Files that outlive a loss of power, and a full disk told as what it is."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def no_room(path: Path, error: BaseException) -> DiskFullError:
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
