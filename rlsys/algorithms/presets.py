"""Presets: the YAML files of this package, and how a config changes one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import Field, ValidationError

from rlsys.config.models import AlgorithmConfig, Config, CriticConfig, PartConfig, PositiveInt, Strict
from rlsys.errors import ConfigError
from rlsys.registry import nearest

FAMILIES = (
    "policy gradient and advantages",
    "clipping and stability",
    "entropy, KL and reference",
    "selection and curricula",
    "supervised and reinforcement",
    "reward signals",
    "segments",
)


class Preset(Strict):
    """A published method. `advantage`, `loss` and `aggregate` name their part; the rest may be left out.

    `family` is one of FAMILIES.
    """

    title: str
    paper: str
    family: str
    summary: str
    advantage: PartConfig
    loss: PartConfig
    aggregate: PartConfig
    curriculum: PartConfig = PartConfig(name="in-order")
    rollout: PartConfig = PartConfig(name="plain")
    partition: PartConfig = PartConfig(name="fixed-length")
    combine: PartConfig = PartConfig(name="weighted-sum")
    adjust: tuple[PartConfig, ...] = ()
    filter: tuple[PartConfig, ...] = ()
    correction: PartConfig = PartConfig(name="none")
    regularize: tuple[PartConfig, ...] = ()
    epochs: PositiveInt = 1
    minibatches: PositiveInt = 1
    critic: CriticConfig | None = None
    # What the method wants elsewhere in the config, by dotted key; shown, not applied.
    settings: Mapping[str, Any] = Field(default_factory=dict)
    unverified: str = ""  # what of the composition could not be checked against the paper or its code


@cache
def presets() -> Mapping[str, Preset]:
    """All presets by name, in alphabetical order. Raises ConfigError naming the file and key of a malformed one."""
    out = {}
    for file in sorted(files(__package__).iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".yaml"):
            continue
        try:
            out[file.name.removesuffix(".yaml")] = Preset.model_validate(yaml.safe_load(file.read_text("utf-8")))
        except (ValidationError, yaml.YAMLError) as error:
            raise ConfigError(f"preset {file}: {error}") from error
    return MappingProxyType(out)


def resolve(config: AlgorithmConfig) -> Preset:
    """The config's preset with the config's changes.

    A part given without a name, or with the name that the preset has there, keeps the preset's other options; one with
    another name replaces it. Lists (`adjust`, `filter`, `regularize`) are replaced whole.
    """
    known = presets()
    if config.preset not in known:
        raise ConfigError(
            f"algorithm.preset: no {config.preset!r}{nearest(config.preset, list(known))}; there are {', '.join(known)}"
        )
    preset = known[config.preset]
    changes: dict[str, object] = {}
    for key in ("curriculum", "rollout", "partition", "combine", "advantage", "loss", "correction", "aggregate"):
        given = getattr(config, key)
        if given is not None:
            changes[key] = _changed(given, getattr(preset, key))
    for key in ("adjust", "filter", "regularize", "epochs", "minibatches"):
        given = getattr(config, key)
        if given is not None:
            changes[key] = given
    if config.critic is not None:
        changes["critic"] = _critic(config.critic, preset.critic)
    return preset.model_copy(update=changes)


def departures(config: Config) -> list[tuple[str, Any, Any]]:
    """Where the config is not what its preset wants elsewhere in it: (dotted key, here, as published)."""
    values = config.model_dump(mode="json")
    out = []
    for key, published in presets()[config.algorithm.preset].settings.items():
        here: Any = values
        for name in key.split("."):
            here = here[name]
        if here != published:
            out.append((key, here, published))
    return out


def _changed(given: PartConfig, preset: PartConfig) -> PartConfig:
    if given.name not in (None, preset.name):
        return given
    return PartConfig(name=preset.name, **(preset.options | given.options))


def _critic(given: CriticConfig, preset: CriticConfig | None) -> CriticConfig:
    if preset is None:
        return given
    return preset.model_copy(update={key: getattr(given, key) for key in given.model_fields_set})
