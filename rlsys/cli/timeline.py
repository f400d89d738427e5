"""`rlsys timeline`: what bounded the steps of a run, and who waited for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.report.critical import STAGES, Analysis, analyse
from rlsys.trackers.timeline import TIMELINE


def timeline(run_dir: Path, step: int | None) -> None:
    """Print the critical path of a step, or of the newest steps together. Raises RunDirError, DataError."""
    found = analyse(run_dir, step)
    console = Console(highlight=False)
    paths, seconds = found.paths, sum(path.seconds for path in found.paths)
    steps = f"step {step}" if step is not None else f"steps {paths[0].step} to {paths[-1].step}"
    console.print(Text.assemble((str(run_dir), "bold"), f": {steps}, {seconds:,.2f} s"))
    if step is None:
        _print(console, "Critical path: what the steps waited for", _stages(found, seconds))
    else:
        console.print(Text(f"bound by: {paths[0].bound}", style="bold"))
        _print(console, "Critical path, from the end of the step before", _parts(found))
    _print(console, "Had work, and waited for", _waits(found))
    if found.traced:
        console.print(f"Prompts to follow in {run_dir / TIMELINE}: {', '.join(found.traced[-4:])}", soft_wrap=True)


def _stages(found: Analysis, seconds: float) -> Table:
    bound = Counter(path.bound for path in found.paths)
    table = _table("stage", "seconds", "share", "bounds", "")
    sums: dict[str, float] = {}
    for path in found.paths:
        for stage, spent in path.by_stage().items():
            sums[stage] = sums.get(stage, 0.0) + spent
    for stage in STAGES:
        if stage in sums:
            share = sums[stage] / seconds if seconds else 0.0
            steps = f"{bound[stage]} of {len(found.paths)}" if bound[stage] else ""
            table.add_row(stage, f"{sums[stage]:,.3f}", f"{share:.0%}", steps, "█" * round(30 * share))
    table.columns[-1].justify = "left"
    return table


def _parts(found: Analysis) -> Table:
    [path] = found.paths
    table = _table("stage", "after s", "seconds", "share", "")
    for part in path.parts:
        times = f"{part.start - path.parts[0].start:,.3f}", f"{part.seconds:,.3f}"
        table.add_row(part.stage, *times, f"{part.seconds / path.seconds:.0%}", Text(part.who))
    table.columns[-1].justify = "left"
    return table


def _waits(found: Analysis) -> Table:
    whom = [name for name in dict.fromkeys(STAGES.values()) if any(role.waited.get(name) for role in found.roles)]
    table = _table("role", "had work", *whom)
    for role in found.roles:
        waited = [_share(role.waited, name, role.seconds) for name in whom]
        table.add_row(role.name, f"{role.busy / role.seconds:.0%}" if role.seconds else "", *waited)
    return table


def _share(waited: Mapping[str, float], name: str, seconds: float) -> str:
    share = waited.get(name, 0.0) / seconds if seconds else 0.0
    return f"{share:.0%}" if share >= 0.005 else ""


def _print(console: Console, title: str, table: Table) -> None:
    """The title may be wider than the table."""
    console.print()
    console.print(Text(title, style="italic"))
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table
