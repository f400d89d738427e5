"""Find and build parts: one file, one class, found by its `name`.

A part is a dataclass whose fields are its options. A package of parts (such as `rlsys.advantages`) has a base class;
every subclass in one of its modules that sets `name` is registered. Nothing is registered by import side effects: the
package is scanned when a part is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from rlsys.errors import ConfigError

T = TypeVar("T")

# Types of options with a range, so that parts need not know how they are checked. All of them are finite.
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
NonNegativeCount = Annotated[int, Field(ge=0)]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class Part:
    """Base of everything that an algorithm is composed of: a dataclass whose fields with `init` are its options.

    `name` is how configs call it, `paper` where its rule was published. `unverified` says which part of the rule could
    not be checked against the paper or its code, and is empty when all of it was. Parts with memory keep it in
    `state_dict`, in plain numbers, strings, lists and dicts.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    unverified: ClassVar[str] = ""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for a state that this part cannot have written."""
        if state:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint has some: {sorted(state)}")


def nearest(word: str, candidates: list[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest candidate, else `""`."""
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def discover(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """All registered subclasses of `base` in the modules of `package`, by name."""
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__ or not issubclass(cls, base) or "name" not in cls.__dict__:
                continue
            name = str(cls.__dict__["name"])
            if name in found:
                raise TypeError(f"two parts are named {name!r}: {found[name].__module__} and {cls.__module__}")
            found[name] = cls
    return found


def build(package: ModuleType, base: type[T], name: str, options: Mapping[str, Any], key: str) -> T:
    """Build the part `name` from its options, checked by type; `key` is the config key, for messages.

    Raises ConfigError for an unknown part, an unknown option, or a value of the wrong type or range.
    """
    parts = discover(package, base)
    if name not in parts:
        raise ConfigError(f"{key}.name: no {name!r}{nearest(name, list(parts))}; there are {', '.join(sorted(parts))}")
    cls = parts[name]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            have = ", ".join(fields) or "none"
            raise ConfigError(
                f"{key}.{option}: {name!r} has no such option{nearest(option, list(fields))}; its options are: {have}"
            )
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *(str(part) for part in first["loc"])])
        raise ConfigError(f"{where}: {first['msg']} (got {first['input']!r})") from None
