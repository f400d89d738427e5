"""`rlsys status`, `rlsys scale` and `rlsys stop`: a running driver is asked, and told; of one that
has ended, what is left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlsys.config.loading import load_config
from rlsys.config.models import Sizes
from rlsys.driver.control import ask
from rlsys.errors import ConfigError, RunDirError
from rlsys.ledger.story import read_run

CONFIG = "config.yaml"
_NOTES = 5


def status(run_dir: Path, as_json: bool) -> None:
    """Print how a run stands: roles, versions, queues, restarts, the newest incident. Raises RunDirError."""
    _check(run_dir)
    console = Console(highlight=False)
    try:
        found = asyncio.run(ask(run_dir, {"ask": "status"}))["status"]
    except RunDirError:
        if as_json:
            raise
        _print_ended(console, run_dir)
        return
    if as_json:
        print(json.dumps(found))
    else:
        _print_running(console, found)


def scale(run_dir: Path, sizes: Sizes) -> None:
    """Have a running job change its sizes. Raises RunDirError when none is running, ConfigError for what cannot be."""
    _check(run_dir)
    wanted = {key: value for key, value in sizes.model_dump().items() if value is not None}
    if not wanted:
        raise ConfigError("nothing to change: give --generators, --reward-workers, --learner-ranks or --zero-stage")
    said = asyncio.run(ask(run_dir, {"ask": "scale", "sizes": wanted}))["said"]
    for line in said or ["nothing changes: these are its sizes already"]:
        print(line)
    if said:
        print(f"under way; `rlsys status {run_dir}` shows it")


def stop(run_dir: Path) -> None:
    """Have a running job end after its step, with a checkpoint. Raises RunDirError when none is running."""
    _check(run_dir)
    for line in asyncio.run(ask(run_dir, {"ask": "stop"}))["said"]:
        print(line)


def _check(run_dir: Path) -> None:
    if not (run_dir / CONFIG).is_file():
        raise RunDirError(f"{run_dir} is no run directory: it has no {CONFIG}")


def _print_running(console: Console, found: Mapping[str, Any]) -> None:
    state = "stopping" if found["stopping"] else "running" if found["started"] else "starting"
    groups, versions, learner = found["groups"], found["versions"], found["learner"]
    console.print(f"[bold]{found['run']}[/bold]: {state}, step {found['step']}/{found['steps']}")
    facts = Table.grid(padding=(0, 2))
    saved = "none yet" if found["checkpoint"] < 0 else f"step {found['checkpoint']}"
    queued = ", ".join(f"{count} for a {kind}" for kind, count in found["queued"].items())
    for name, text in (
        ("versions", f"learner {versions['learner']}, every generator has {versions['gate']}"),
        ("groups", "{under_way} under way, {buffered} buffered, {open_slots} slots open".format(**groups)),
        ("queued", queued),
        ("learner", f"{learner['ranks']} ranks, ZeRO {learner['zero_stage']}"),
        ("going on", ", ".join(found["doing"]) or "nothing"),
        ("checkpoint", saved),
        ("newest incident", found["newest_incident"] or "none"),
    ):
        facts.add_row(f"[bold]{name}[/bold]", text)
    console.print(facts)
    table = Table("role", "state", "version", "work", "restarts", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for worker in found["workers"]:
        version = "" if worker["version"] is None else str(worker["version"])
        table.add_row(worker["name"], worker["state"], version, str(worker["work"]), str(worker["failures"]))
    console.print(table)


def _print_ended(console: Console, run_dir: Path) -> None:
    story, config = read_run(run_dir), load_config(run_dir / CONFIG)
    last = story.steps[-1]["step"] if story.steps else 0
    state = "ended" if last >= config.run.steps else "not running"
    console.print(f"[bold]{config.run.name}[/bold]: {state} (on this machine), step {last}/{config.run.steps}")
    fates = story.fates
    console.print(
        f"{fates['trained']:,} prompts trained, {sum(fates['dropped'].values()):,} dropped, "
        f"{fates['pending']:,} pending"
    )
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    console.print(f"checkpoints: {', '.join(checkpoints) or 'none'}")
    for note in story.notes[-_NOTES:]:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note.at))
        detail = ", ".join(f"{key} {value}" for key, value in note.detail.items() if isinstance(value, str | int))
        console.print(f"  {at}  {note.event}: {detail}", soft_wrap=True)
