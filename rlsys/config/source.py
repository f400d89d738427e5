"""Nested plain values with the place each key came from: a YAML file and line, or the command line.

Scalars follow YAML 1.2's core schema: `1e-6` is a number, and `no`, `on` and `2020-01-01` are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlsys.errors import ConfigError

Key = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
# Python reads what the pattern admits; PyYAML's own constructor would take 010 for octal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


@dataclass
class Source:
    """A tree of plain values. `origins` says where a key (and everything below it) was written."""

    values: dict[str, Any]
    name: str
    origins: dict[Key, str] = field(default_factory=dict)

    def origin(self, key: Key) -> str:
        """Where `key`, or the nearest key above it, was written."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                return self.origins[key[:length]]
        return self.name


def dotted(key: Sequence[str]) -> str:
    return ".".join(key)


def read_yaml(path: Path) -> Source:
    """The mapping in a YAML file. Raises ConfigError with the line for anything that is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    source = Source({}, str(path))
    values = _parse(text, str(path), source.origins)
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {_kind(values)}"
        raise ConfigError(f"{path}: {found}; a config is a mapping of keys such as `model:` and `prompts:`")
    source.values = values
    return source


def read_value(text: str, where: str) -> Any:
    """The value of one command-line option, typed as YAML would; text that is empty stays text."""
    return _parse(text, where, {}) if text else ""


def _parse(text: str, name: str, origins: dict[Key, str]) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _convert(loader, node, (), name, origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


def _convert(loader: _Loader, node: yaml.Node, at: Key, name: str, origins: dict[Key, str]) -> Any:
    """Plain values of a node; notes the line of every key, and refuses a key that is there twice."""
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = f"{name}, line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{line}: a key must be a word, not a mapping or a list")
            key = str(key_node.value)
            if key in mapping:
                raise ConfigError(f"{line}: {dotted((*at, key))}: the key is there twice")
            origins[(*at, key)] = line
            mapping[key] = _convert(loader, value_node, (*at, key), name, origins)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            origins[(*at, str(i))] = f"{name}, line {child.start_mark.line + 1}"
        return [_convert(loader, child, (*at, str(i)), name, origins) for i, child in enumerate(node.value)]
    return loader.construct_object(node)


def _kind(value: object) -> str:
    return {list: "a list", str: "text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")


# ---- bases and overrides ------------------------------------------------------------------------------------------


def extend(base: Source, child: Source) -> Source:
    """`child` on top of `base`: mappings are merged key by key, everything else is replaced.

    A mapping that names another `kind`, or a part of another `name`, replaces the base's: its keys would not fit.
    """
    origins = dict(base.origins)

    def merge(low: Mapping[str, Any], high: Mapping[str, Any], at: Key) -> dict[str, Any]:
        out = dict(low)
        for key, value in high.items():
            below = (*at, key)
            held = low.get(key)
            if isinstance(held, dict) and isinstance(value, dict) and not _other_part(held, value, below):
                out[key] = merge(held, value, below)
                continue
            for old in [o for o in origins if o[: len(below)] == below]:
                del origins[old]
            out[key] = value
        return out

    values = merge(base.values, child.values, ())
    return Source(values, child.name, origins | child.origins)


def _other_part(held: Mapping[str, Any], new: Mapping[str, Any], key: Key) -> bool:
    tag = "name" if key[0] == "algorithm" else "kind"
    return tag in held and tag in new and held[tag] != new[tag]


def split_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`["--a.b", "1", "--c=2"]` to `[("a.b", "1"), ("c", "2")]`."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or len(option) == 2:
            raise ConfigError(f"command line: {option!r}: expected `--dotted.key value` or `--dotted.key=value`")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"command line: {option} has no value; write `{option} value` or `{option}=value`")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def override(source: Source, key_text: str, value_text: str) -> None:
    """Set one key in place, making the mappings above it."""
    where = f"command line, --{key_text}"
    key = tuple(key_text.split("."))
    if not all(key):
        raise ConfigError(f"{where}: not a dotted key such as driver.max_staleness")
    node: Any = source.values
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        at = dotted(key[:depth])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"{where}: {at} is a list of {len(node)}; give a place from 0 to {len(node) - 1}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise ConfigError(f"{where}: {at} is {node!r}, which has no keys below it")
        if last:
            node[index] = read_value(value_text, where)
        else:
            node = node[index]
    for old in [o for o in source.origins if o[: len(key)] == key]:
        del source.origins[old]
    source.origins[key] = "command line"
