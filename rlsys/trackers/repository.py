"""Which code a run is made with: what git says of a directory."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

DEADLINE_S = 10.0


def git_state(directory: Path) -> dict[str, Any]:
    """`{"commit": "0a1b...", "branch": "main", "dirty": False}`; empty in no repository, or without git.

    `branch` is None on a detached head, `commit` before the first one. Dirty: tracked files differ from the commit.
    What they differ by is never read: it may hold keys.
    """
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode:
        return {}
    lines = done.stdout.splitlines()
    head = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
    commit, branch = head.get("branch.oid"), head.get("branch.head")
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": any(not line.startswith("#") for line in lines),
    }
