"""What algorithms and parts there are, in a form to print: taken from the presets and the docstrings, written once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsys.algorithms.compose import KINDS, Algorithm
from rlsys.algorithms.presets import FAMILIES, presets
from rlsys.config.models import AlgorithmConfig
from rlsys.registry import discover


@dataclass(frozen=True, slots=True)
class OptionInfo:
    name: str
    type: str  # such as "float", "int or null", "k1 | k2 | k3"
    default: Any
    range: str = ""  # such as "> 0", "0 to 1"; empty: any


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One registered part. `key` is the config key, below `algorithm`, that it goes under."""

    key: str
    name: str
    paper: str
    summary: str  # first sentence or line of the docstring
    equation: str  # its indented blocks
    doc: str
    options: tuple[OptionInfo, ...]
    unverified: str = ""  # what could not be checked against the paper or its code
    state: tuple[str, ...] = ()  # what it remembers from step to step, and a checkpoint keeps
    metrics: tuple[str, ...] = ()  # what it logs, as its code names it; `{...}` stands for a name that is known later


@dataclass(frozen=True, slots=True)
class AlgorithmInfo:
    """One preset. `composition` is what `Algorithm.resolved` gives; `parts` explains the parts in it."""

    name: str
    title: str
    summary: str
    family: str
    paper: str
    needs: tuple[str, ...]  # the true ones of `compose.Needs`
    composition: dict[str, Any]
    parts: tuple[PartInfo, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the paper sets elsewhere in the config
    unverified: str = ""  # of the composition and of its parts

    @property
    def switch(self) -> str:
        """How to use it, as lines of YAML and as an option of the command line."""
        options = "".join(f" --{key} {json.dumps(value)}" for key, value in self.settings.items())
        return f"algorithm:\n  preset: {self.name}\n\n--algorithm.preset {self.name}{options}"


def parts() -> dict[str, tuple[PartInfo, ...]]:
    """Every registered part by config key (`advantage`, `loss`, ...), in order of name."""
    out = {}
    for key, (package, base) in KINDS.items():
        found = discover(package, base)
        out[key] = tuple(_part(key, found[name]) for name in sorted(found))
    return out


def catalog() -> tuple[AlgorithmInfo, ...]:
    """Every preset, in order of name."""
    return tuple(describe(name) for name in presets())


def describe(name: str) -> AlgorithmInfo:
    """One preset. Raises ConfigError for an unknown name."""
    algorithm = Algorithm.from_config(AlgorithmConfig(preset=name))
    preset = presets()[name]
    parts = tuple(_part(key, type(part)) for key, used in algorithm.parts.items() for part in used)
    doubts = [preset.unverified, *(f"{part.name}: {part.unverified}" for part in parts if part.unverified)]
    return AlgorithmInfo(
        name=name,
        title=preset.title,
        summary=preset.summary,
        family=preset.family,
        paper=preset.paper,
        needs=tuple(
            need for need, needed in dataclasses.asdict(algorithm.needs).items() if needed and need != "samples"
        ),
        composition=algorithm.resolved(),
        parts=parts,
        settings=dict(preset.settings),
        unverified="; ".join(doubt for doubt in doubts if doubt),
    )


def _part(key: str, cls: Any) -> PartInfo:
    doc = inspect.getdoc(cls) or ""
    blocks = re.findall(r"::\n\n((?:    .*\n?|\n(?=    ))+)", doc)
    hints = typing.get_type_hints(cls)
    ranges = typing.get_type_hints(cls, include_extras=True)
    return PartInfo(
        key=key,
        name=cls.name,
        paper=cls.paper,
        summary=" ".join(doc.split("\n\n")[0].split()).rstrip(":"),
        equation="\n".join(textwrap.dedent(block).strip("\n") for block in blocks),
        doc=doc,
        options=tuple(
            OptionInfo(f.name, _type(hints[f.name]), _default(f), _range(ranges[f.name]))
            for f in dataclasses.fields(cls)
            if f.init
        ),
        unverified=getattr(cls, "unverified", ""),
        state=tuple(f.name for f in dataclasses.fields(cls) if not f.init and f.repr and f.name != "in_reward"),
        metrics=tuple(sorted(set(re.findall(r'"([a-z][a-z0-9-]*/[a-z_0-9{}.]+)"', inspect.getsource(cls))))),
    )


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _range(hint: Any) -> str:
    """`> 0`, `0 to 1`, from the constraints of an option's type."""
    bounds: dict[str, Any] = {}
    for part in (hint, *typing.get_args(hint)):
        for info in getattr(part, "__metadata__", ()):
            for limit in getattr(info, "metadata", ()):
                bounds |= {key: getattr(limit, key) for key in ("gt", "ge", "lt", "le") if hasattr(limit, key)}
    if bounds.keys() == {"ge", "le"}:
        return f"{bounds['ge']} to {bounds['le']}"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return ", ".join(f"{signs[key]} {value}" for key, value in bounds.items())


def markdown() -> str:
    """All presets as one page: docs/algorithms.md."""
    lines = [
        "# Algorithms",
        "",
        "Written by `rlsys algorithms --markdown` from the presets and the docstrings of their parts.",
    ]
    lines += [
        "",
        "`--algorithm.preset NAME` uses one; every option below can be changed in the config or on the command line.",
    ]
    infos = catalog()
    for family in FAMILIES:
        lines += [
            "",
            f"## {family[0].upper()}{family[1:]}",
            "",
            "| preset | what it does | needs | verified |",
            "| --- | --- | --- | --- |",
        ]
        for info in (info for info in infos if info.family == family):
            link = f"[{info.name}](#{re.sub(r'[^a-z0-9-]', '', info.name)})"
            lines.append(
                f"| {link} | {info.summary} | {', '.join(info.needs)} | {'in part' if info.unverified else 'yes'} |"
            )
    for info in infos:
        lines += ["", f"### {info.name}", "", f"**{info.title}.** {info.paper}", "", info.summary, ""]
        lines += ["```", info.switch.split("\n\n")[1], "```"]
        if info.unverified:
            lines += ["", f"*Not verified:* {info.unverified}."]
        described = ", ".join(f"{part.key} [{part.name}](#{part.key}-{part.name})" for part in info.parts)
        lines += ["", f"Parts: {described}."]
    lines += ["", "## Parts"]
    for key, found in parts().items():
        for part in found:
            lines += ["", f"### {key} {part.name}", "", part.summary + "."]
            if part.equation:
                lines += ["", "```", part.equation, "```"]
            lines += ["", f"Source: {part.paper}."]
            if part.options:
                told = [f"`{o.name}` = {o.default} ({o.type}{', ' + o.range if o.range else ''})" for o in part.options]
                lines += ["", "Options: " + "; ".join(told) + "."]
            if part.state:
                lines += ["", f"Remembers: {', '.join(part.state)}."]
            if part.metrics:
                lines += ["", "Logs: " + ", ".join(f"`{name}`" for name in part.metrics) + "."]
            if part.unverified:
                lines += ["", f"*Not verified:* {part.unverified}."]
    return "\n".join(lines) + "\n"


def _type(hint: Any) -> str:
    """`int`, `float or null`, `k1 | k2 | k3`."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if args := typing.get_args(hint):
        return " or ".join(_type(arg) for arg in args)
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))
