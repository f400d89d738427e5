"""What git says of the folder that a run is started in."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlsys.trackers.repository import git_state


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`repository("commit", ...)` runs git in a new one, at `tmp_path`, with one file under version control."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--initial-branch", "trunk")
    (tmp_path / "code.py").write_text("one")
    git("add", "code.py")
    return git


def test_commit_branch_and_what_is_not_committed(repository: Any, tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "branch": "trunk", "dirty": True}
    repository("commit", "-m", "first")
    commit = repository("rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "branch": "trunk", "dirty": False}
    (tmp_path / "new.txt").write_text("not under version control")
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "code.py").write_text("KEY = 123")
    assert git_state(tmp_path) == {"commit": commit, "branch": "trunk", "dirty": True}
    repository("checkout", "--detach", "--quiet")
    assert git_state(tmp_path) == {"commit": commit, "branch": None, "dirty": True}


def test_without_a_repository_or_git(tmp_path: Path, repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(outside) == {}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {}
