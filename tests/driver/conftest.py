"""What the tests of the driver share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlsys.ledger.story import read_run


@pytest.fixture(scope="session")
def check_fates() -> Callable[[Path], dict[str, Any]]:
    """Compares the ledger's fates with the rollouts on disk, and returns them."""

    def check(run_dir: Path) -> dict[str, Any]:
        story = read_run(run_dir)
        fates = story.fates
        rows: dict[str, set[str]] = {}
        for path in sorted((run_dir / "rollouts").glob("*.parquet")):
            for row in pq.read_table(path, columns=["prompt_id", "fate"]).to_pylist():
                rows.setdefault(row["prompt_id"], set()).add(row["fate"])
        assert all(len(kinds) == 1 for kinds in rows.values()), rows
        assert sum(kinds == {"trained"} for kinds in rows.values()) == fates["trained"]
        assert sum(fates["dropped"].values()) + fates["trained"] + fates["pending"] == story.prompts
        return fates

    return check
