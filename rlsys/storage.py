"""Files behind a URL (fsspec: s3://, gs://, file://, ...), and the folders of a node that they pass through.

    Storage   a folder there: put, get, read, write, list, delete
    Place     where a part of a checkpoint is: a folder that all nodes see, or a Storage
    deliver   write a part: in its folder, or in one of this node, from where it is put
    fetch     where this node can read a part: in its folder, or in a copy that is made once and checked

Every file has a deadline. What goes wrong is a StorageError that names the URL; a file that is missing or has changed
is a DamagedFileError. Neither Ray nor torch is loaded here.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from rlsys.durable import Files, Fingerprint, below, disk_is_full, fingerprint, fingerprints, no_room
from rlsys.errors import ConfigError, DamagedFileError, StorageError

T = TypeVar("T")

AT_ONCE = 8  # files on their way
FILE_TIMEOUT_S = 1800.0
LOCK_TIMEOUT_S = 7200.0  # for another process of this node to fetch what we want
KEPT_S = 86_400.0  # what killed processes have fetched, and nobody has asked for since
CACHE = "RLSYS_CACHE"  # in the environment: the folder of this node
_EXTRAS = {"s3": "rlsys[s3]", "s3a": "rlsys[s3]"}


def is_url(path: object) -> bool:
    return "://" in str(path)


def check_driver(url: str, key: str) -> None:
    """Raise ConfigError unless the package for this kind of URL is installed. Nothing is connected to."""
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise ConfigError(
            f"{key}: {url}: {error}; it may be s3://, gs://, file:// and whatever else fsspec knows"
        ) from error
    except ImportError as error:
        how = _EXTRAS.get(protocol)
        install = f"pip install '{how}'" if how else "install that package"
        raise ConfigError(f"{key}: {url}: {error}: {install}, on every node") from error


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder behind a URL. `files` are what is known to be in it, by name; `timeout_s` is for each file.

    Names have slashes. All methods may be called from several threads.
    """

    url: str
    timeout_s: float = FILE_TIMEOUT_S
    files: Files = field(default_factory=dict)

    def __truediv__(self, part: str) -> Storage:
        return Storage(f"{self.url.rstrip('/')}/{part}", self.timeout_s, below(self.files, part))

    def __str__(self) -> str:
        return self.url

    def put(self, local: Path, name: str) -> None:
        """Write a file there, in the place of one of its name."""
        fs, path = self._there(name)
        try:
            self._in_time("written", name, lambda: fs.put_file(str(local), path))
        except FileNotFoundError as error:
            raise self._failed("written", name, error) from error

    def get(self, name: str, local: Path, expected: Fingerprint | None = None) -> None:
        """Copy a file to here. Raises DamagedFileError when it is missing, or not what is expected."""
        fs, path = self._there(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._in_time("read", name, lambda: fs.get_file(path, str(local)))
        except FileNotFoundError as error:
            raise DamagedFileError(f"{self / name} is missing") from error
        if expected is not None and (found := fingerprint(local)) != expected:
            what = f"has {found['bytes']} bytes, expected {expected['bytes']}"
            raise DamagedFileError(
                f"{self / name} {what}"
                if found["bytes"] != expected["bytes"]
                else f"the content of {self / name} has changed"
            )

    def put_tree(self, folder: Path) -> dict[str, Fingerprint]:
        """Write all files below a folder; returns what they are."""
        files = fingerprints(folder)
        in_parallel(lambda name: self.put(folder / name, name), files)
        return files

    def get_tree(self, folder: Path) -> None:
        """Copy `files` into a folder. Raises DamagedFileError."""
        folder.mkdir(parents=True, exist_ok=True)
        in_parallel(lambda name: self.get(name, folder / name, self.files[name]), self.files)

    def read(self, name: str) -> str | None:
        """A small text; None where there is none. What is no text comes back with marks in its place."""
        fs, path = self._there(name)
        try:
            content: bytes = self._in_time("read", name, lambda: fs.cat_file(path))
        except FileNotFoundError:
            return None
        return content.decode(errors="replace")

    def write(self, name: str, text: str, create: bool = False) -> bool:
        """Write a small text. `create`: only where there is no file of this name; False where there is one."""
        fs, path = self._there(name)
        try:
            options = {"mode": "create"} if create else {}
            self._in_time("written", name, lambda: fs.pipe_file(path, text.encode(), **options))
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise self._failed("written", name, error) from error
        return True

    def list(self) -> dict[str, int]:
        """Bytes of every file below it, by name; nothing where there is no such folder."""
        return {name: int(found["size"]) for name, found in self.described().items()}

    def described(self) -> dict[str, dict[str, Any]]:
        """What the storage says of every file below it, by name."""
        fs, path = self._there()
        path = path.rstrip("/")

        def find() -> dict[str, dict[str, Any]]:
            fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
            return found

        try:
            found = self._in_time("listed", "", find)
        except FileNotFoundError:
            return {}
        return {p.removeprefix(f"{path}/"): info for p, info in sorted(found.items()) if p.startswith(f"{path}/")}

    def delete(self, names: Iterable[str]) -> None:
        """Those that are not there any more are deleted already."""
        in_parallel(self._delete, names)

    def _delete(self, name: str) -> None:
        fs, path = self._there(name)
        with suppress(FileNotFoundError):
            self._in_time("deleted", name, lambda: fs.rm_file(path))
        if isinstance(fs, LocalFileSystem):  # elsewhere there are no folders, only names
            with suppress(OSError):  # not empty
                for folder in (Path(path).parents[i] for i in range(name.count("/"))):
                    folder.rmdir()

    def _there(self, name: str = "") -> tuple[Any, str]:
        options = {"use_listings_cache": False}
        url = (self / name).url if name else self.url
        try:
            fs, path = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            check_driver(self.url, "storage")
            raise self._failed("opened", name, error) from error
        if isinstance(fs, LocalFileSystem):
            fs.auto_mkdir = True
        return fs, path

    def _in_time(self, done: str, name: str, work: Callable[[], T]) -> T:
        """What the work returns, within the deadline. Its FileNotFoundError and FileExistsError are the caller's."""
        outcome: Future[T] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:  # whatever it is, it belongs to the caller
                outcome.set_exception(error)

        # Of its own, and a daemon: a file system that hangs is not to hold up the end of this process.
        threading.Thread(target=run, daemon=True, name="storage").start()
        try:
            return outcome.result(self.timeout_s)
        except (FileNotFoundError, FileExistsError):
            raise
        except TimeoutError as error:
            raise StorageError(
                f"{self._name(name)} could not be {done} within {self.timeout_s:g} s (run.storage_timeout_s): look "
                "whether this node reaches the storage; the same command goes on"
            ) from error
        except Exception as error:  # every package for a storage has errors of its own
            raise self._failed(done, name, error) from error

    def _failed(self, done: str, name: str, error: Exception) -> Exception:
        if disk_is_full(error):
            return no_room(self._name(name), error)
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            advice = "make the bucket or folder, or correct the URL"
        elif isinstance(error, PermissionError) or "redential" in said:
            advice = (
                "keys for it belong in the environment of this node (AWS_ACCESS_KEY_ID and the like), with the rights"
            )
        else:
            advice = "look whether this node reaches the storage; the same command goes on"
        return StorageError(f"{self._name(name)} could not be {done} ({type(error).__name__}: {said}): {advice}")

    def _name(self, name: str) -> str:
        return (self / name).url if name else self.url


Place = Path | Storage


def in_parallel(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Do the work for each of the names; raises what the first one raised that failed."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="storage") as threads:
        doing = [threads.submit(work, name) for name in names]
        try:
            for each in doing:
                each.result()
        finally:
            threads.shutdown(cancel_futures=True)


# ---- on a node ------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder of this node: RLSYS_CACHE, else ~/.cache/rlsys."""
    return Path(os.environ.get(CACHE) or "~/.cache/rlsys").expanduser()


def deliver(place: Place, write: Callable[[Path], object]) -> dict[str, Fingerprint]:
    """Have a part written where it belongs; returns what its files are.

    Raises what `write` does, DiskFullError and StorageError.
    """
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)
        write(place)
        return fingerprints(place)
    with scratch() as folder:
        write(folder)
        return place.put_tree(folder)


def fetch(place: Place) -> Path:
    """Where a part can be read on this node. Its processes share one copy; `let_go` removes it.

    Raises DamagedFileError for one that is not what its fingerprints say, and StorageError.
    """
    if isinstance(place, Path):
        return place
    folder = _copy_of(place)
    with locked(folder):
        if not folder.exists():
            _sweep(folder.parent)
            aside = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                place.get_tree(aside)
                os.rename(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


def let_go(place: Place) -> None:
    """The copy that `fetch` made is not needed any more."""
    if isinstance(place, Storage):
        folder = _copy_of(place)
        with locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def readable(place: Place) -> Iterator[Path]:
    """A part as a folder, for as long as the block lasts; a copy that nobody shares."""
    if isinstance(place, Path):
        yield place
        return
    with scratch() as folder:
        place.get_tree(folder)
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process of this node at a time. Raises StorageError when it takes too long."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")
    try:
        with FileLock(path, timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise StorageError(
            f"{folder} is held by another process of this node for more than {LOCK_TIMEOUT_S:g} s: end that one, or "
            f"give this run a cache of its own ({CACHE})"
        ) from error


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder of this node that goes with the block. Those that killed processes have left behind go, too."""
    parent = cache_dir() / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.glob("*.lock"):
        with suppress(OSError), path.open() as left:  # gone meanwhile, or its process lives
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()
    folder = parent / uuid.uuid4().hex
    # Made under another name, so that it is locked before anybody looks for it.
    new = folder.with_suffix(".new")
    with new.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(new, folder.with_suffix(".lock"))
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def _copy_of(place: Storage) -> Path:
    return cache_dir() / "fetched" / hashlib.sha256(place.url.encode()).hexdigest()[:32]


def _sweep(parent: Path) -> None:
    """Remove what processes that were killed have fetched, long ago."""
    for folder in parent.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > KEPT_S:
            shutil.rmtree(folder, ignore_errors=True)
