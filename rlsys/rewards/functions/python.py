"""Any Python function, by import path."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from rlsys.errors import RewardSetupError
from rlsys.registry import nearest
from rlsys.rewards import RewardFunction, Sample, Value

_OFFERED = tuple(f.name for f in fields(Sample))


@dataclass
class Python(RewardFunction):
    """A function named as `module:function` or `file.py:function`, plain or `async def`.

    It is called with keyword arguments, of which it takes those it wants: `prompt`, `response`, `answer`, `metadata`,
    `token_ids`, `truncated`, `task`, `prompt_id`, `sample` (see `Sample`), and all of its own `arguments`. It returns a
    finite number, or a dict of named numbers of which `"score"` counts and the others are recorded::

        def score(response, answer, bonus=0.1):
            return {"score": float(answer in response) + bonus, "length": len(response)}
    """

    name: ClassVar[str] = "python"

    path: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        function = self._load()
        self._function: Callable[..., Any] = function
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  (an object whose __call__ is async)
        )
        self._wanted = self._wanted_arguments(function)

    @property
    def is_async(self) -> bool:
        return self._is_async

    def score(self, sample: Sample) -> Value | Awaitable[Value]:
        return self._function(**{name: getattr(sample, name) for name in self._wanted}, **self.arguments)

    def _load(self) -> Callable[..., Any]:
        where, _, attribute = self.path.rpartition(":")
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        function: Any = module
        for part in attribute.split("."):
            if not hasattr(function, part):
                have = [n for n, v in vars(function).items() if callable(v) and not n.startswith("_")]
                raise RewardSetupError(f"{where} has no {attribute!r}{nearest(attribute, have)}")
            function = getattr(function, part)
        if inspect.isclass(function) or not callable(function):
            raise RewardSetupError(f"{self.path} is {_describe(function)}, not a function")
        return function

    def _wanted_arguments(self, function: Callable[..., Any]) -> tuple[str, ...]:
        parameters = inspect.signature(function).parameters.values()
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        for argument in self.arguments:
            if argument in _OFFERED:
                raise RewardSetupError(f"the option {argument!r} of {self.path} is taken: the sample brings its own")
            if argument not in named and not takes_any:
                raise RewardSetupError(
                    f"{self.path} takes no argument {argument!r}{nearest(argument, list(named))}, but options give one"
                )
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in _OFFERED and name not in self.arguments:
                raise RewardSetupError(
                    f"{self.path} needs an argument {name!r}{nearest(name, list(_OFFERED))}; it can have "
                    f"{', '.join(_OFFERED)}, and what `options` give"
                )
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise RewardSetupError(f"{self.path} has positional-only parameters; it is called with keyword arguments")
        return tuple(name for name in _OFFERED if takes_any or name in named)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"rlsys_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RewardSetupError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.resolve().parent))  # as for a script, so that it can import its neighbours
    spec.loader.exec_module(module)
    return module


def _describe(value: object) -> str:
    return "a class" if inspect.isclass(value) else f"a {type(value).__name__}"
