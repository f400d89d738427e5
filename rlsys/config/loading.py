"""From a YAML file and dotted overrides to a checked `Config`, and back to YAML.

Every mistake is a ConfigError that names where the key was written, the dotted key, what is wrong and, for a misspelt
key or value, the nearest valid one. All mistakes of one config are reported together.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlsys.config.models import Config
from rlsys.config.source import Key, Source, dotted, extend, override, read_yaml, split_overrides
from rlsys.errors import ConfigError
from rlsys.registry import nearest


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, with command-line overrides such as `["--driver.max_staleness", "0"]`.

    A file may begin with `extends: other.yaml` (relative to itself). `{name}` in `run.dir` and
    `run.storage` is replaced.
    """
    source = _read(Path(path))
    for key, value in split_overrides(overrides):
        override(source, key, value)
    return parse_config(source)


def parse_config(source: Source) -> Config:
    """Check a tree of values; raises one ConfigError that lists everything wrong with it."""
    try:
        # JSON's strict mode is what we want of YAML: a list is a tuple, 1 is a float, but true is no number
        # and "1" neither.
        config = Config.model_validate_json(json.dumps(source.values), strict=True)
    except ValidationError as error:
        details = error.errors()
        places = [detail["loc"] for detail in details]
        # A list whose only elements are wrong is also reported as too short, which it is not.
        whole = [d for d in details if d["type"] != "too_short" or not _is_within(d["loc"], places)]
        raise ConfigError("\n".join(_explain(source, detail) for detail in whole)) from None
    run = config.run
    storage = None if run.storage is None else run.storage.replace("{name}", run.name)
    named = run.model_copy(update={"dir": run.dir.replace("{name}", run.name), "storage": storage})
    return config.model_copy(update={"run": named})


def dump_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, aside and then renamed; `load_config` reads the same config back."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(to_yaml(config.model_dump(mode="json")), encoding="utf-8")
    os.replace(aside, path)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their own order, one key a line."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """Text that any YAML reader could take for something else is quoted."""
    plain = value.replace("_", "").replace("-", "").replace("/", "").replace(".", "").isalnum() and value[0].isalpha()
    words = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style=None if plain and value.lower() not in words else '"'
    )


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    """`1.0e-06`, which YAML 1.1 and 1.2 both take for a number."""
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _float)


def _read(path: Path, above: tuple[Path, ...] = ()) -> Source:
    source = read_yaml(path)
    base = source.values.pop("extends", None)
    if base is None:
        return source
    where = source.origin(("extends",))
    if not isinstance(base, str):
        raise ConfigError(f"{where}: extends: must be the path of a config file; got {base!r}")
    chain = (*above, path.resolve())
    base_path = path.parent / base
    if base_path.resolve() in chain:
        raise ConfigError(f"{where}: extends: {base} extends this file in turn; a base cannot go round in a circle")
    if not base_path.is_file():
        raise ConfigError(f"{where}: extends: no file {base_path}")
    return extend(_read(base_path, chain), source)


def _is_within(whole: tuple[int | str, ...], places: Sequence[tuple[int | str, ...]]) -> bool:
    return any(len(place) > len(whole) and place[: len(whole)] == whole for place in places)


# ---- messages -----------------------------------------------------------------------------------------------------


def _explain(source: Source, detail: ErrorDetails) -> str:
    key, model = _locate(detail["loc"])
    kind, given = detail["type"], detail["input"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    if kind == "extra_forbidden":
        what = "unknown key" + _nearest_key(key, model)
    elif kind == "missing":
        what = "is missing"
    elif kind == "union_tag_not_found":
        key, what = (*key, "kind"), f"is missing; it is one of {_tags(key)}"
    elif kind == "union_tag_invalid":
        given = context["tag"]
        names = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
        key, what = (*key, "kind"), f"no {given!r}{nearest(str(given), names)}; it is one of {', '.join(names)}"
    elif kind == "literal_error":
        expected = [word.strip(" '") for word in str(context["expected"]).replace(" or ", ",").split(",")]
        what = f"must be {context['expected']}; got {show(given)}{nearest(str(given), expected)}"
    elif kind == "string_pattern_mismatch":
        what = f"{given!r} must match {context['pattern']}"
    elif kind == "too_short":
        what = "must have at least one element"
    else:
        what = detail["msg"].replace("Input should be", "must be", 1).replace("a valid integer", "an integer")
        what = what.replace("a valid ", "a ")
        what += f"; got {show(given)}"
        if kind == "string_type":
            what += " (quote it if it is meant as text)"
    return f"{source.origin(key)}: {dotted(key)}: {what}"


def show(value: Any) -> str:
    """A value as messages show it: text in quotes, the rest as JSON."""
    return json.dumps(value) if not isinstance(value, str) else repr(value)


def _nearest_key(key: Key, model: type[BaseModel] | None) -> str:
    """A key of the same name elsewhere in the config, else the sibling that is spelt like it."""
    elsewhere = [name for name in all_keys() if name.rpartition(".")[2] == key[-1]]
    if elsewhere:
        return f" here (did you mean {' or '.join(repr(name) for name in elsewhere[:3])}?)"
    siblings = list(model.model_fields) if model else []
    return nearest(key[-1], siblings) or f"; the keys here are {', '.join(siblings)}"


def _locate(location: tuple[int | str, ...]) -> tuple[Key, type[BaseModel] | None]:
    """The dotted key of a pydantic location (which also holds the tags of unions) and the model it is in."""
    key: list[str] = []
    annotation: Any = Config
    model: type[BaseModel] | None = None
    for part in location:
        options = _models(annotation)
        if len(options) > 1:  # a tagged union: this part is the tag
            annotation = next(o for o in options if part in get_args(o.model_fields["kind"].annotation))
            model = annotation
            continue
        key.append(str(part))
        if isinstance(part, int):
            annotation = next((a for a in get_args(_plain(annotation)) if a is not Ellipsis), None)
        elif options:
            model = options[0]
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
        else:
            annotation = None
    return tuple(key), model


def _plain(annotation: Any) -> Any:
    """Without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (types.UnionType, Union):
        kept = [a for a in get_args(annotation) if a is not type(None)]
        return _plain(kept[0]) if len(kept) == 1 else annotation
    return annotation


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models a value of this annotation may be."""
    annotation = _plain(annotation)
    options = get_args(annotation) if get_origin(annotation) in (types.UnionType, Union) else (annotation,)
    flat = [model for option in options if option is not annotation for model in _models(option)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        flat.append(annotation)
    return flat


def _tags(key: Key) -> str:
    annotation: Any = Config
    for part in key:
        annotation = _models(annotation)[0].model_fields[part].annotation
    return ", ".join(get_args(model.model_fields["kind"].annotation)[0] for model in _models(annotation))


def all_keys(annotation: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key that a config can have, lists and options of parts left out."""
    keys: list[str] = []
    for model in _models(annotation):
        for name, info in model.model_fields.items():
            key = f"{prefix}{name}"
            if key not in keys:
                keys.append(key)
            keys += [k for k in all_keys(info.annotation, f"{key}.") if k not in keys]
    return keys
