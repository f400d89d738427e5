"""`rlsys metrics`: what a run logs, and how to read it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.errors import ConfigError
from rlsys.metrics.catalog import DEFINITIONS, PANELS, find, prometheus_name
from rlsys.metrics.pages import grafana, markdown
from rlsys.registry import nearest


def metrics(name: str | None, as_markdown: bool = False, as_grafana: bool = False) -> None:
    """Print the list, or one metric, or docs/metrics.md, or the dashboard. Raises ConfigError for an unknown one."""
    if as_markdown or as_grafana:
        print(markdown() if as_markdown else grafana(), end="")
        return
    console = Console()
    if name is None:
        console.print(_list())
        return
    name = name if find(name) else f"eval/{name}"
    definition = find(name)
    if definition is None:
        name = name.removeprefix("eval/")
        raise ConfigError(f"no metric {name!r}" + nearest(name, [d.name for d in DEFINITIONS]))
    said = f"{definition.name} ({definition.unit})"
    console.print(Text.assemble((said, "bold"), f"\n{definition.read}\nIn Prometheus: {prometheus_name(name)}"))


def _list() -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("metric", "unit", "how to read it"):
        table.add_column(column, overflow="fold")
    for panel in PANELS:
        table.add_section()
        table.add_row("", "", Text(panel.about, style="italic"))
        for d in DEFINITIONS:
            if d.panel == panel.name:
                table.add_row(Text(d.name, style="bold"), d.unit, Text(d.read))
    return table
