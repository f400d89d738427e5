"""Build the reward functions of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlsys.config.models import RewardFunctionConfig, RewardsConfig
from rlsys.errors import ConfigError, RewardSetupError
from rlsys.registry import build
from rlsys.rewards import RewardFunction, functions


def build_functions(config: RewardsConfig) -> list[tuple[str, RewardFunction]]:
    """The functions with their names, in order; nothing of theirs is imported yet.

    Raises ConfigError (unknown kind or option, wrong type, double name) and RewardSetupError (`path` is not one).
    """
    built: dict[str, RewardFunction] = {}
    for i, function in enumerate(config.functions):
        key = f"rewards.functions[{i}]"
        if function.name in built:
            raise ConfigError(f"{key}.name: {function.name!r} is used twice; each function needs a name of its own")
        built[function.name] = build(
            functions, RewardFunction, function.kind, _options(function, key), f"{key}.options"
        )
    return list(built.items())


def _options(function: RewardFunctionConfig, key: str) -> dict[str, Any]:
    if function.kind != "python":
        if function.path is not None:
            raise ConfigError(f"{key}.path: only for kind python, and this is {function.kind}; remove it")
        return dict(function.options)
    if function.path is None:
        raise ConfigError(f"{key}.path: kind python needs one, `module:function` or `file.py:function`")
    where, colon, attribute = function.path.rpartition(":")
    if not colon or not where or not attribute:
        raise RewardSetupError(f"{key}.path: {function.path!r} is not `module:function` or `file.py:function`")
    if where.endswith(".py") and not Path(where).is_file():
        raise RewardSetupError(f"{key}.path: there is no file {where}")
    return {"path": function.path, "arguments": dict(function.options)}


def applicable(config: RewardsConfig, task: str) -> list[int]:
    """Indices of the functions that score prompts of `task`."""
    return [i for i, f in enumerate(config.functions) if f.tasks is None or task in f.tasks]


def with_absolute_paths(config: RewardsConfig) -> RewardsConfig:
    """The same functions, found from any working directory."""

    def absolute(function: RewardFunctionConfig) -> RewardFunctionConfig:
        where, _, attribute = (function.path or "").rpartition(":")
        if not where.endswith(".py"):
            return function
        return function.model_copy(update={"path": f"{Path(where).resolve()}:{attribute}"})

    return config.model_copy(update={"functions": tuple(absolute(function) for function in config.functions)})
