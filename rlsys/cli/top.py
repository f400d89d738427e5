"""`rlsys top`: a running job in a terminal, looked at once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import App, ComposeResult, ScreenStackError
from textual.containers import VerticalScroll
from textual.css.query import NoMatches
from textual.widgets import DataTable, Footer, Sparkline, Static

from rlsys.cli.control import CONFIG
from rlsys.driver.control import ask
from rlsys.errors import RlsysError, RunDirError
from rlsys.ledger.story import Event, read_incidents
from rlsys.trackers.jsonl import METRICS, read_rows

EVERY_S = 1.0
_RECENT = 10  # steps that rates and waits are the mean of
_CURVE = 120  # steps of the reward
_INCIDENTS = 6


@dataclass(frozen=True, slots=True)
class View:
    """What is known at one moment. `status` is the answer that `rlsys status --json` prints; None: nobody answers."""

    status: Mapping[str, Any] | None
    absent: str  # why nobody answers
    rows: Sequence[Mapping[str, Any]]  # of the newest steps
    incidents: Sequence[Event]


async def look(run_dir: Path) -> View:
    """Ask the driver, and read what is on disk."""
    status, absent = None, ""
    try:
        status = (await ask(run_dir, {"ask": "status"}))["status"]
    except (RlsysError, OSError) as error:
        absent = str(error)
    rows, incidents = await asyncio.gather(asyncio.to_thread(_rows, run_dir), asyncio.to_thread(_incidents, run_dir))
    return View(status, absent, rows, incidents)


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(run_dir / METRICS)[-_CURVE:]
    except (OSError, ValueError):  # it is being replaced, or damaged: there are no figures then
        return []


def _incidents(run_dir: Path) -> list[Event]:
    try:
        return read_incidents(run_dir, _INCIDENTS)
    except RlsysError:  # there is no ledger yet
        return []


class Top(App[None]):
    """Where the driver is gone, the newest figures stay, and it is asked again: it may come back."""

    TITLE = "rlsys"
    BINDINGS: ClassVar = [("q", "quit", "quit")]
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #state { padding: 0 1; height: auto; }
    #facts { padding: 1 1 0 1; height: auto; }
    #workers { height: auto; max-height: 50%; margin: 1 0 0 0; }
    .title { padding: 1 1 0 1; text-style: bold; height: auto; }
    #reward { height: 3; margin: 0 1; }
    #incidents { padding: 0 1; height: auto; }
    """

    def __init__(self, run_dir: Path, every_s: float = EVERY_S) -> None:
        super().__init__()
        self._run_dir = run_dir
        self._every_s = every_s

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(id="state")
            yield Static(id="facts")
            yield DataTable[str | Text](id="workers", cursor_type="none")
            yield Static("reward", classes="title")
            yield Sparkline([], id="reward", summary_function=lambda values: sum(values) / len(values))
            yield Static("newest incidents", classes="title")
            yield Static(id="incidents")
        yield Footer()

    def on_mount(self) -> None:
        table = self.query_one("#workers", DataTable)
        table.add_columns("role", "state", "version", "work", "restarts")
        self.run_worker(self.follow())

    async def follow(self) -> None:
        """Look, and show it, until the screen is taken down."""
        with suppress(NoMatches, ScreenStackError):
            while True:
                self.show(await look(self._run_dir))
                await asyncio.sleep(self._every_s)

    def show(self, view: View) -> None:
        """Put what is known on the screen."""
        self.query_one("#state", Static).update(_state(self._run_dir, view))
        self.query_one("#facts", Static).update(_facts(view))
        if view.status is not None:
            table = self.query_one("#workers", DataTable)
            table.clear()
            for worker in view.status["workers"]:
                version = "" if worker["version"] is None else str(worker["version"])
                style = "" if worker["state"] == "healthy" else "bold yellow"
                cells = worker["name"], worker["state"], version, str(worker["work"]), str(worker["failures"])
                table.add_row(*(Text(cell, style) for cell in cells))
        rewards = [row["reward/mean"] for row in view.rows if "reward/mean" in row]
        self.query_one("#reward", Sparkline).data = rewards
        self.query_one("#incidents", Static).update(_incident_lines(view.incidents))


def _state(run_dir: Path, view: View) -> Text:
    found = view.status
    if found is None:
        step = view.rows[-1]["step"] if view.rows else 0
        return Text.assemble(
            (str(run_dir), "bold"), f": step {step}, ", ("nobody answers", "bold yellow"), f": {view.absent}"
        )
    state = "stopping" if found["stopping"] else "running" if found["started"] else "starting"
    style = "bold green" if state == "running" else "bold yellow"
    seconds = _mean(view.rows, "time/step_s")
    left = found["steps"] - found["step"]
    until = f", {_clock(left * seconds)} to go" if seconds and left > 0 else ""
    return Text.assemble(
        *((found["run"], "bold"), ": ", (state, style), f", step {found['step']} of {found['steps']}{until}")
    )


def _facts(view: View) -> Table:
    facts = Table.grid(padding=(0, 2))
    rows: list[tuple[str, str]] = []
    if (found := view.status) is not None:
        groups, versions, learner = found["groups"], found["versions"], found["learner"]
        saved = "none yet" if found["checkpoint"] < 0 else f"step {found['checkpoint']}"
        rows += [
            ("versions", f"learner {versions['learner']}, every generator has {versions['gate']}"),
            ("groups", "{under_way} under way, {buffered} buffered, {open_slots} slots open".format(**groups)),
            ("queued", ", ".join(f"{count} for a {kind}" for kind, count in found["queued"].items())),
            ("learner", f"ranks: {learner['ranks']}, ZeRO {learner['zero_stage']}; checkpoint: {saved}"),
            ("going on", ", ".join(found["doing"]) or "nothing"),
        ]
    seconds = _mean(view.rows, "time/step_s")
    if seconds:
        rate = f"{seconds:.2f} s a step, {60 / seconds:.1f} steps a minute"
        for name, what in (("tokens/generated_per_s", "generated"), ("tokens/trained_per_s", "trained")):
            if (tokens := _mean(view.rows, name)) is not None:
                rate += f", {tokens:,.0f} tokens/s {what}"
        rows.append(("rate", rate))
        rows.append(("waits", ", ".join(_waits(view.rows, seconds)) or "none"))
    for name, text in rows:
        facts.add_row(Text(name, "bold"), Text(text))
    return facts


def _waits(rows: Sequence[Mapping[str, Any]], seconds: float) -> list[str]:
    """Of the newest steps, as shares of their time."""
    waits = []
    for name, what in (
        ("wait/learner_for_rollouts_s", "the learner for rollouts"),
        ("wait/generators_for_learner_s", "generators for the learner"),
    ):
        if (waited := _mean(rows, name)) is not None:
            waits.append(f"{what} {waited / seconds:.0%}")
    return waits


def _incident_lines(incidents: Sequence[Event]) -> Text:
    lines = []
    for note in incidents:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(note.at))
        detail = ", ".join(
            f"{key} {value}" for key, value in note.detail.items() if isinstance(value, str | int | float)
        )
        lines.append(f"{at}  {note.event}: {detail}".partition("\n")[0])
    return Text("\n".join(lines) or "none")


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [row[name] for row in rows[-_RECENT:] if name in row]
    return sum(found) / len(found) if found else None


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under a minute"
    )


def top(run_dir: Path) -> None:
    """Show the run until q is pressed. Raises RunDirError when it is no run directory."""
    if not (run_dir / CONFIG).is_file():
        raise RunDirError(f"{run_dir} is no run directory: it has no {CONFIG}")
    Top(run_dir).run()
