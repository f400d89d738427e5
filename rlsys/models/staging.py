"""Models behind a URL: copied to the cache of a node once, for all of its processes.

    CACHE/models/NAME-DIGEST/   of the URL and of what the storage says of its files, so that a model which is changed
                                there is another one here

Hub names are `huggingface_hub`'s, which keeps a cache of its own in the same manner.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from rlsys.errors import DataError
from rlsys.storage import Storage, cache_dir, in_parallel, is_url, locked

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_TELLING = ("size", "ETag", "etag", "md5Hash", "content_md5", "crc32c", "mtime", "LastModified", "updated")


def staged(path: str | Path, weights: bool = True) -> str:
    """Where a model is on this node. What is no URL stays as it is.

    Without `weights` only the files beside them are copied. Raises DataError when nothing is there, StorageError.
    """
    if not is_url(path):
        return str(path)
    storage = Storage(str(path).rstrip("/"))
    there = storage.described()
    if not there:
        raise DataError(f"model.path: there is nothing at {storage}; give a folder in Hugging Face format")
    wanted = [name for name in there if weights or not name.endswith(WEIGHTS)]
    known = {name: {key: str(there[name][key]) for key in _TELLING if key in there[name]} for name in wanted}
    digest = hashlib.sha256(json.dumps([storage.url, known], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "models" / f"{PurePosixPath(storage.url).name}-{digest}"
    with locked(folder):
        if not folder.exists():
            _copy(storage, wanted, folder)
    return str(folder)


def names_of(path: str | Path) -> Collection[str]:
    """The files at the top of a model's folder, or behind its URL. Raises DataError when nothing is there."""
    if is_url(path):
        names = {name for name in Storage(str(path)).list() if "/" not in name}
        if not names:
            raise DataError(
                f"model.path: there is nothing at {path}; give a folder in Hugging Face format, or a hub name"
            )
        return names
    return {entry.name for entry in Path(path).iterdir() if entry.is_file()}


def _copy(storage: Storage, names: Collection[str], folder: Path) -> None:
    """Aside, then renamed."""
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        in_parallel(lambda name: storage.get(name, aside / name), names)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
