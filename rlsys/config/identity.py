"""Which config a run belongs to: what a resumed run may change, and what would make it another run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlsys.config.loading import load_config, show
from rlsys.config.models import Config
from rlsys.errors import RunDirError

# What a resumed run may change without becoming another run: how far it goes, how it is watched, what it runs on, and
# what becomes of failures. All time-outs as well.
MAY_DIFFER = (
    "run.name", "run.dir", "run.storage", "run.steps", "run.resume", "trackers", "resources", "checkpoint",
    "model.tiny.cache_dir",
    "rollout.generators", "rollout.engine", "rollout.attempts", "rollout.on_refused",
    "rewards.workers", "rewards.concurrency", "rewards.on_failure",
    "reference.threads", "reference.micro_batch_tokens",
    "learner.ranks", "learner.zero_stage", "learner.offload", "learner.packing", "learner.micro_batch_tokens",
    "learner.logprob_chunk", "learner.gradient_checkpointing", "learner.threads", "learner.non_finite",
    "driver.max_groups_in_flight", "driver.restarts", "driver.autoscale",
    "eval.every", "eval.every_prompts", "eval.keep_responses", "eval.after",
)  # fmt: skip


def same_run(config: Config, other: Config) -> list[str]:
    """Dotted keys that differ between two configs and may not, for one to go on with the other's run."""
    ours, theirs = flatten(config.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    return [key for key in differing if not _may_differ(key)]


def config_hash(config: Config) -> str:
    """SHA-256 of what may not differ between a run and its continuation."""
    kept = {key: value for key, value in flatten(config.model_dump(mode="json")).items() if not _may_differ(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def check_same_run(config: Config, written: Path) -> None:
    """Raise RunDirError when `written`, the config.yaml of a run directory, belongs to another run."""
    other = load_config(written)
    keys = same_run(config, other)
    if not keys:
        return
    ours, theirs = flatten(config.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
    lines = [f"  {key}: {show(theirs.get(key))} there, {show(ours.get(key))} now" for key in keys]
    raise RunDirError(
        f"{written.parent} belongs to a run with another config:\n" + "\n".join(lines) + "\n"
        "Give this run a directory of its own (--run.name or --run.dir), or put these keys back to go on with that one."
    )


def _may_differ(key: str) -> bool:
    return key.endswith("timeout_s") or any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of values as dotted keys and plain values; what is empty is a value itself."""
    items: list[tuple[str, Any]]
    if isinstance(tree, dict) and tree:
        items = list(tree.items())
    elif isinstance(tree, list) and tree:
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
