"""Which runs belong together, and what tells the others apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.report.reading import Run

# What says where a run is kept and how it is watched: two runs that differ in it only are the same experiment.
_ASIDE = ("run.name", "run.dir", "run.resume", "trackers", "model.tiny.cache_dir")


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one config that differ in seeds only. `seeds` has those keys, with the value of each run."""

    label: str
    runs: Sequence[Run]
    seeds: Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that is not the same in all groups, with its value in each; "" where a group has no such key."""

    key: str
    values: Sequence[str]


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """In order of their first runs. A run without a readable config is a group of its own."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        kept = {key: value for key, value in run.config.items() if not (_is_aside(key) or _is_seed(key))}
        found.setdefault(json.dumps(kept, sort_keys=True, default=str) if kept else str(run.path), []).append(run)
    members = list(found.values())
    names = Counter(group[0].name for group in members)
    return [
        Group(group[0].name if names[group[0].name] == 1 else _label(group), group, _seeds(group)) for group in members
    ]


def differences(groups: Sequence[Group]) -> list[Difference]:
    """Between the configs of the groups, seeds and places left out."""
    configs = [group.runs[0].config for group in groups if group.runs[0].config]
    if len(configs) < 2:
        return []
    keys = sorted({key for config in configs for key in config if not (_is_aside(key) or _is_seed(key))})
    rows = [Difference(key, [show(group.runs[0].config, key) for group in groups]) for key in keys]
    return [row for row in rows if len({show(config, row.key) for config in configs}) > 1]


def show(config: Mapping[str, Any], key: str) -> str:
    """The value of a key, as JSON; text without its quotes."""
    if key not in config:
        return ""
    value = config[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _label(runs: Sequence[Run]) -> str:
    """By the folders of the runs."""
    if len(runs) > 3:
        return f"{runs[0].label} and {len(runs) - 1} more"
    return ", ".join(run.label for run in runs)


def _seeds(runs: Sequence[Run]) -> dict[str, list[Any]]:
    keys = sorted({key for run in runs for key in run.config if _is_seed(key)})
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len(set(map(str, found))) > 1}


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def _is_aside(key: str) -> bool:
    return any(key == aside or key.startswith(f"{aside}.") for aside in _ASIDE)
