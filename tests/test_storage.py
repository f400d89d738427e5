"""Files behind a URL: on a disk, and on an S3 server over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from rlsys import storage as module
from rlsys.durable import fingerprint
from rlsys.errors import ConfigError, DamagedFileError, DiskFullError, StorageError
from rlsys.storage import Storage, cache_dir, check_driver, deliver, fetch, let_go, readable, scratch


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    url = request.getfixturevalue("s3") if request.param == "s3" else f"file://{tmp_path / 'storage'}"
    return Storage(f"{url}/run")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    for name, content in {"a": b"", "b/c.bin": bytes(range(256)) * 5000, "b/ d#1?.txt": b"odd"}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_tree_comes_back_as_it_was(storage: Storage, tree: Path, tmp_path: Path) -> None:
    assert storage.list() == {}
    files = storage.put_tree(tree)
    assert files == {name: fingerprint(tree / name) for name in contents(tree)}
    assert storage.list() == {name: len(content) for name, content in contents(tree).items()}
    assert (storage / "b").list() == {" d#1?.txt": 3, "c.bin": 1_280_000}
    known = Storage(storage.url, files=files)
    known.get_tree(tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tree)
    (known / "b").get_tree(tmp_path / "part")
    assert contents(tmp_path / "part") == contents(tree / "b")
    storage.delete(["a", "b/c.bin", "b/c.bin", "never/there"])
    assert storage.list() == {"b/ d#1?.txt": 3}


def test_small_texts(storage: Storage) -> None:
    assert storage.read("x/y.json") is None
    assert storage.write("x/y.json", "först")
    assert storage.read("x/y.json") == "först"
    assert storage.write("x/y.json", "then")
    assert not storage.write("x/y.json", "never", create=True)
    assert storage.read("x/y.json") == "then"
    assert storage.write("x/z.json", "new", create=True)
    assert storage.list() == {"x/y.json": 4, "x/z.json": 3}


def test_names_that_begin_alike_are_not_below(storage: Storage) -> None:
    for name in ("run/a", "run-2/b", "run.old"):
        storage.write(name, name)
    assert (storage / "run").list() == {"a": 5}


@pytest.mark.parametrize(
    ("content", "said"), [("other", "has 5 bytes, expected 3"), ("odb", "has changed"), (None, "is missing")]
)
def test_a_file_that_is_not_what_was_put_there(
    storage: Storage, tree: Path, tmp_path: Path, content: str | None, said: str
) -> None:
    known = Storage(storage.url, files=storage.put_tree(tree))
    storage.delete(["b/ d#1?.txt"])
    if content is not None:
        storage.write("b/ d#1?.txt", content)
    with pytest.raises(DamagedFileError, match=rf"run/b/ d#1\?\.txt {said}"):
        known.get_tree(tmp_path / "back")
    with pytest.raises(DamagedFileError):
        fetch(known)
    assert not any(path.is_dir() for path in (cache_dir() / "fetched").iterdir()), "nothing half-fetched is left"


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(s3: str) -> None:
    nowhere = Storage("s3://no-such-bucket/run")
    assert nowhere.list() == {}
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/run/a could not be written .*make the bucket"):
        nowhere.write("a", "text")


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            with pytest.raises(StorageError, match=r"s3://bucket/.* could not be listed.*the same command goes on"):
                Storage(s3, timeout_s=20.0).list()
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_disk_that_is_full(small_disk: Callable, tree: Path) -> None:
    disk = small_disk(kib=256)
    with pytest.raises(DiskFullError, match=r"file:///.*/run/b/.* cannot be written"):
        Storage(f"file://{disk.path}/run").put_tree(tree)


class Hanging(LocalFileSystem):
    """As a network file system whose server is gone."""

    protocol = "hanging"
    back = threading.Event()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("hanging://")))

    def cat_file(self, *_: Any, **__: Any) -> bytes:
        self.back.wait(60.0)
        return b""


@pytest.fixture
def hanging() -> Iterator[str]:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    Hanging.back.clear()
    yield "hanging:///tmp/x"
    Hanging.back.set()


def test_nothing_is_waited_for_without_end(hanging: str) -> None:
    with pytest.raises(
        StorageError, match=r"hanging:///tmp/x/a could not be read within 0.1 s \(run.storage_timeout_s\)"
    ):
        Storage(hanging, timeout_s=0.1).read("a")


def test_what_has_to_be_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check_driver("file:///x", "run.storage")
    with pytest.raises(ConfigError, match=r"run\.storage: nope://x: Protocol not known: nope"):
        check_driver("nope://x", "run.storage")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = sys.modules["fsspec.registry"]
    monkeypatch.delitem(known._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"model\.path: s3://b: Install s3fs.*pip install 'rlsys\[s3\]'"):
        check_driver("s3://b", "model.path")


# ---- on a node ------------------------------------------------------------------------------------------------------


def test_a_part_is_delivered_and_fetched(storage: Storage, tree: Path, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        for name, content in contents(tree).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    here = tmp_path / "here" / "learner"
    files = deliver(storage / "learner", write)
    assert files == deliver(here, write)
    assert list((cache_dir() / "scratch").iterdir()) == [], "the copy of this node is gone"
    assert fetch(here) == here
    let_go(here)
    known = Storage((storage / "learner").url, files=files)
    for place in (here, known):
        with readable(place) as folder:
            assert contents(folder) == contents(tree)
    folder = fetch(known)
    (folder / "mine").touch()
    assert fetch(known) == folder
    assert (folder / "mine").exists(), "one copy for all processes of the node"
    let_go(known)
    let_go(known)
    assert not folder.exists()
    assert contents(here) == contents(tree)


FETCHING = """
import sys
from rlsys.durable import fingerprint
from rlsys.storage import Storage, fetch
from pathlib import Path
tree = Path(sys.argv[2])
files = {p.relative_to(tree).as_posix(): fingerprint(p) for p in tree.rglob("*") if p.is_file()}
calls = []
get = Storage.get
Storage.get = lambda self, name, *more: (calls.append(name), get(self, name, *more))[1]
fetch(Storage(sys.argv[1], files=files))
print(len(calls))
"""


def test_processes_of_a_node_fetch_once(tmp_path: Path, tree: Path) -> None:
    storage = Storage(f"file://{tmp_path / 'storage'}")
    storage.put_tree(tree)
    command = [sys.executable, "-c", FETCHING, storage.url, str(tree)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    fetched = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(fetched) == [0, 0, 0, 3]


HOLDING = """
import sys
from rlsys.storage import scratch
with scratch() as folder:
    (folder / "big").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_has_left_goes() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    with scratch():
        assert (folder / "big").exists(), "its process lives"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert folder.exists()
    with scratch() as other:
        assert not folder.exists()
        assert [p.name for p in other.parent.iterdir() if p.is_dir()] == [other.name]


def test_what_was_fetched_long_ago_goes(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"file://{tmp_path / 'storage'}")
    files = storage.put_tree(tree)
    old = fetch(Storage(storage.url, files=files))
    os.utime(old, (0, 0))
    new = fetch(Storage(f"{storage.url}/b", files=(Storage(storage.url, files=files) / "b").files))
    assert new.exists()
    assert not old.exists()
    assert module.KEPT_S > 3600
