"""`rlsys algorithms`: what there is, taken from the presets and the docstrings of their parts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.algorithms.catalog import AlgorithmInfo, PartInfo, catalog, describe


def algorithms(name: str | None) -> None:
    """Print the list, or one preset. Raises ConfigError for an unknown one."""
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
    console.print(Text("How to use it", style="bold"))
    console.print(Text(f"{info.switch}\n"))
    for part in info.parts:
        _print_part(console, part, info)


def _list(infos: tuple[AlgorithmInfo, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("preset", "what it does", "needs"):
        table.add_column(column, overflow="fold")
    for info in infos:
        table.add_row(Text(info.name, style="bold"), Text(info.summary), ", ".join(info.needs))
    return table


def _print_part(console: Console, part: PartInfo, info: AlgorithmInfo) -> None:
    console.print(Text(f"{part.key}: {part.name}", style="bold"))
    console.print(Text(part.summary))
    console.print(Text(part.paper, style="italic"))
    if part.equation:
        console.print(Text("\n".join(f"    {line}" for line in part.equation.splitlines()), style="cyan"))
    used = _values(info.composition[part.key], part.name)
    for option in part.options:
        console.print(Text(f"  {option.name} = {used.get(option.name, option.default)}  ({option.type})"))
    console.print()


def _values(composed: Any, name: str) -> dict[str, Any]:
    """The options of a part in a resolved composition, where some kinds are lists of parts."""
    parts = composed if isinstance(composed, list) else [composed]
    return next(part for part in parts if part["name"] == name)
