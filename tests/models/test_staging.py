"""Models behind a URL are copied to a node once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.errors import DataError
from rlsys.models.loading import check_folder, load_tokenizer
from rlsys.models.staging import staged
from rlsys.storage import Storage, cache_dir


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> str:
    """Of the tiny model."""
    base = request.getfixturevalue("s3") if request.param == "s3" else f"file://{tmp_path / 'storage'}"
    Storage(f"{base}/tiny").put_tree(tiny_model)
    return f"{base}/tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_is_the_model(url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(url)
    folder = staged(url)
    assert contents(Path(folder)) == contents(tiny_model)
    monkeypatch.setattr(Storage, "get", None)
    assert staged(url) == folder, "it is not copied again"
    assert staged(f"{url}/") == folder


def test_without_its_weights(url: str, tiny_model: Path) -> None:
    folder = Path(staged(url, weights=False))
    assert not list(folder.glob("*.safetensors"))
    assert load_tokenizer(folder).encode("1+1") == load_tokenizer(tiny_model).encode("1+1")
    assert list(Path(staged(url)).glob("*.safetensors"))


def test_a_model_that_is_changed_there_is_another_one(url: str) -> None:
    before = staged(url)
    text = Storage(url).read("config.json") or ""
    Storage(url).write("config.json", text.replace(" ", "  "))
    after = staged(url)
    assert after != before
    assert (Path(after) / "config.json").read_text() != text


def test_what_is_no_url_stays(tiny_model: Path) -> None:
    assert staged(tiny_model) == str(tiny_model)
    assert staged("owner/name") == "owner/name"
    assert not (cache_dir() / "models").exists()


def test_what_is_no_model_is_told(url: str) -> None:
    with pytest.raises(DataError, match=r"model\.path: there is nothing at .*/nothing"):
        check_folder(f"{url}/nothing")
    with pytest.raises(DataError, match=r"model\.path: there is nothing at .*/nothing"):
        staged(f"{url}/nothing")
    Storage(url).delete(["tokenizer.json"])
    with pytest.raises(DataError, match="has no tokenizer"):
        check_folder(url)


STAGING = """
import sys
from rlsys.models.staging import staged
from rlsys.storage import Storage
calls, get = [], Storage.get
Storage.get = lambda self, name, *more: (calls.append(name), get(self, name, *more))[1]
print(len(calls), staged(sys.argv[1]), len(calls))
"""


def test_processes_of_a_node_copy_it_once(url: str, tiny_model: Path) -> None:
    command = [sys.executable, "-c", STAGING, url]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert len({folder for _, folder, _ in said}) == 1
    assert sorted(int(calls) for _, _, calls in said) == [0, 0, 0, len(contents(tiny_model))]


def test_a_copy_that_was_cut_off_counts_for_nothing(url: str, tiny_model: Path) -> None:
    folder = Path(staged(url))
    shutil.rmtree(folder)
    (folder.parent / f"{folder.name}.tmp").mkdir()
    (folder.parent / f"{folder.name}.tmp" / "model.safetensors").write_bytes(b"half")
    assert contents(Path(staged(url))) == contents(tiny_model)
    assert sorted(os.listdir(folder.parent)) == [folder.name, f"{folder.name}.lock"]
