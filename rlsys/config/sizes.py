"""The sizes that can change while a run goes on: their keys in the config, and RUN/sizes.json for a supervisor.

    {"supervisor": "4f1c...", "sizes": {"rollout.generators": 3, "rewards.workers": 1, ...}}

The file is for the supervisor that it names, which starts the driver again with these sizes. A command that a person
starts has the sizes of its config.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlsys.config.models import Config, Sizes
from rlsys.durable import replace_text, writing

SIZES = "sizes.json"
SUPERVISOR = "RLSYS_SUPERVISED"  # in the environment of a supervised driver: which supervisor has started it

KEYS = {
    "generators": "rollout.generators",
    "reward_workers": "rewards.workers",
    "learner_ranks": "learner.ranks",
    "zero_stage": "learner.zero_stage",
}


def resized(config: Config, sizes: Sizes) -> Config:
    """The config with these sizes; those that are null stay as they are."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in sizes.model_dump(exclude_none=True).items():
        section, _, key = KEYS[name].partition(".")
        changes.setdefault(section, {})[key] = value
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return config.model_copy(update=sections)


def keep_sizes(run_dir: Path, sizes: Sizes) -> None:
    """Write the file. Raises DiskFullError."""
    values = {KEYS[name]: value for name, value in sizes.model_dump(exclude_none=True).items()}
    path = run_dir / SIZES
    with writing(path):
        replace_text(path, json.dumps({"supervisor": os.environ.get(SUPERVISOR), "sizes": values}) + "\n")


def kept_sizes(run_dir: Path, supervisor: str) -> list[str]:
    """What a driver kept for this supervisor, as options of the command line."""
    path = run_dir / SIZES
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if content.get("supervisor") != supervisor:
        return []
    return [part for key, value in content["sizes"].items() for part in (f"--{key}", str(value))]
