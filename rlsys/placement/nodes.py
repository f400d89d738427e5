"""The nodes of a cluster: described in a file, or as Ray tells of them (`rlsys.actors.cluster`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import Field, PositiveInt, ValidationError

from rlsys.config.models import Strict
from rlsys.errors import ConfigError

GIB = 1024**3

_SELECTOR = re.compile(r"(?P<no>!?)(?:in\((?P<values>[^()]*)\)|(?P<value>[^()!]*))")


@dataclass(frozen=True, slots=True)
class Node:
    """`total` and `free` by Ray's names: CPU, GPU, memory (bytes) and custom resources."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""  # Ray's; empty where the node is only described

    def has(self, labels: Mapping[str, str]) -> bool:
        """Whether it has labels as Ray's selectors ask for: `value`, `!value`, `in(a,b)`, `!in(a,b)`."""
        return all(_selects(selector, self.labels.get(key)) for key, selector in labels.items())


def _selects(selector: str, value: str | None) -> bool:
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        raise ConfigError(f"{selector!r} is no selector of labels: give a value, !value, in(a,b) or !in(a,b)")
    wanted = [found["value"]] if found["values"] is None else [text.strip() for text in found["values"].split(",")]
    return (value in wanted) != bool(found["no"])


class _Described(Strict):
    """Nodes of one kind."""

    name: str
    count: PositiveInt = 1
    cpus: float = Field(ge=0)
    gpus: float = Field(0, ge=0)
    memory_gib: float = Field(ge=0)
    custom: dict[str, float] = Field({})
    labels: dict[str, str] = Field({})


class _Cluster(Strict):
    nodes: list[_Described] = Field(min_length=1)


def read_nodes(path: Path) -> list[Node]:
    """Nodes that a YAML file describes. Raises ConfigError, which names the file and the key.

    Example::

        nodes:
          - {name: gpu, count: 8, cpus: 96, gpus: 8, memory_gib: 1000, labels: {pool: gpu}}
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        cluster = _Cluster.model_validate(content)
    except ValidationError as error:
        wrong = "\n".join(f"{path}: {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(wrong) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    return [
        Node(kind.name if kind.count == 1 else f"{kind.name}-{i}", resources, resources, kind.labels)
        for kind in cluster.nodes
        for resources in [
            {"CPU": kind.cpus, "GPU": kind.gpus, "memory": kind.memory_gib * GIB, **kind.custom},
        ]
        for i in range(kind.count)
    ]
