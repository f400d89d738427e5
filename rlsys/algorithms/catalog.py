"""What algorithms and parts there are, in a form to print: taken from the presets and the docstrings, written once."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass
from typing import Any

from rlsys.algorithms.compose import KINDS, Algorithm
from rlsys.algorithms.presets import presets
from rlsys.config.models import AlgorithmConfig
from rlsys.registry import discover


@dataclass(frozen=True, slots=True)
class OptionInfo:
    name: str
    type: str  # as written in the code, without the range
    default: Any


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


@dataclass(frozen=True, slots=True)
class AlgorithmInfo:
    """One preset. `composition` is what `Algorithm.resolved` gives; `parts` explains the parts in it."""

    name: str
    title: str
    summary: str
    family: str
    paper: str
    needs: tuple[str, ...]  # of "reference", "values", "proximal", "entropy"
    composition: dict[str, Any]
    parts: tuple[PartInfo, ...]

    @property
    def switch(self) -> str:
        """How to use it, as lines of YAML and as an option of the command line."""
        return f"algorithm:\n  preset: {self.name}\n\n--algorithm.preset {self.name}"


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
        parts=tuple(_part(key, type(part)) for key, used in algorithm.parts.items() for part in used),
    )


def _part(key: str, cls: Any) -> PartInfo:
    doc = inspect.getdoc(cls) or ""
    blocks = re.findall(r"::\n\n((?:    .*\n?|\n(?=    ))+)", doc)
    hints = typing.get_type_hints(cls)
    return PartInfo(
        key=key,
        name=cls.name,
        paper=cls.paper,
        summary=" ".join(doc.split("\n\n")[0].split()).rstrip(":"),
        equation="\n".join(textwrap.dedent(block).strip("\n") for block in blocks),
        doc=doc,
        options=tuple(
            OptionInfo(field.name, _type(hints[field.name]), field.default)
            for field in dataclasses.fields(cls)
            if field.init
        ),
    )


def _type(hint: Any) -> str:
    """`int`, `float or null`, `k1 | k2 | k3`."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if args := typing.get_args(hint):
        return " or ".join(_type(arg) for arg in args)
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))
