"""`rlsys algorithms`: what there is, taken from the presets and the docstrings of their parts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.algorithms.catalog import AlgorithmInfo, PartInfo, catalog, describe, markdown
from rlsys.algorithms.presets import FAMILIES


def algorithms(name: str | None, as_markdown: bool = False) -> None:
    """Print the list, or one preset, or docs/algorithms.md. Raises ConfigError for an unknown one."""
    if as_markdown:
        print(markdown(), end="")
        return
    console = Console()
    if name is None:
        console.print(_list(catalog()))
        console.print("\n`rlsys algorithms NAME` explains one; `--algorithm.preset NAME` uses it.")
        return
    info = describe(name)
    console.print(Text(f"{info.name}: {info.title}", style="bold"))
    console.print(Text(info.paper, style="italic"))
    console.print(Text(f"{info.summary}\n"))
    console.print(Text(f"Family: {info.family}. Needs: {', '.join(info.needs) or 'nothing but rewards'}.\n"))
    if info.unverified:
        console.print(Text(f"Not verified against the paper: {info.unverified}.\n", style="yellow"))
    console.print(Text("How to use it", style="bold"))
    console.print(Text(f"{info.switch}\n"))
    for part in info.parts:
        _print_part(console, part, info)


def _list(infos: tuple[AlgorithmInfo, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("preset", "what it does", "needs", "verified", "paper"):
        table.add_column(column, overflow="fold")
    for family in FAMILIES:
        table.add_section()
        table.add_row("", Text(family, style="italic"))
        for info in (info for info in infos if info.family == family):
            verified = "in part" if info.unverified else "yes"
            row = (Text(info.name, style="bold"), Text(info.summary), ", ".join(info.needs), verified, Text(info.paper))
            table.add_row(*row)
    return table


def _print_part(console: Console, part: PartInfo, info: AlgorithmInfo) -> None:
    console.print(Text(f"{part.key}: {part.name}", style="bold"))
    console.print(Text(part.summary))
    console.print(Text(part.paper, style="italic"))
    if part.equation:
        console.print(Text("\n".join(f"    {line}" for line in part.equation.splitlines()), style="cyan"))
    used = _values(info.composition[part.key], part.name)
    for option in part.options:
        limits = f", {option.range}" if option.range else ""
        console.print(Text(f"  {option.name} = {used.get(option.name, option.default)}  ({option.type}{limits})"))
    if part.state:
        console.print(Text(f"  remembers {', '.join(part.state)}"))
    if part.metrics:
        console.print(Text(f"  logs {', '.join(part.metrics)}"))
    console.print()


def _values(composed: Any, name: str) -> dict[str, Any]:
    """The options of a part in a resolved composition, where some kinds are lists of parts."""
    parts = composed if isinstance(composed, list) else [composed]
    return next(part for part in parts if part["name"] == name)
