"""What `rlsys algorithms` prints: every preset and part explains itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlsys.algorithms import Algorithm, catalog, describe, parts
from rlsys.algorithms.catalog import markdown
from rlsys.algorithms.presets import FAMILIES
from rlsys.config.models import AlgorithmConfig, Config
from rlsys.errors import ConfigError

PARTS = [part for kind in parts().values() for part in kind]


@pytest.mark.parametrize("part", PARTS, ids=[f"{part.key}-{part.name}" for part in PARTS])
def test_every_part_cites_its_paper_and_shows_its_equation(part) -> None:  # type: ignore[no-untyped-def]
    assert any(year.isdigit() and 1950 < int(year) < 2100 for year in part.paper.replace(",", " ").split()), "no year"
    assert part.equation, "no indented block after '::' in the docstring"
    assert all(line.strip() in part.doc for line in part.equation.splitlines())
    assert part.summary
    assert "\n" not in part.summary


@pytest.mark.parametrize("info", catalog(), ids=lambda info: info.name)
def test_every_preset_explains_itself_and_its_switch_works(info) -> None:  # type: ignore[no-untyped-def]
    assert info.title
    assert info.family in FAMILIES
    assert info.paper
    assert len(info.summary) <= 160, "one line"
    yaml_part, option = info.switch.split("\n\n")
    config = AlgorithmConfig.model_validate(yaml.safe_load(yaml_part)["algorithm"])
    assert Algorithm.from_config(config).resolved() == info.composition
    assert option.startswith(f"--algorithm.preset {info.name}")
    for key in info.settings:  # of a config, with values that it takes
        model = Config
        for name in key.split("."):
            assert name in model.model_fields, key
            model = model.model_fields[name].annotation


def test_the_page_of_all_algorithms_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "algorithms.md"
    assert page.read_text("utf-8") == markdown(), "write it anew: rlsys algorithms --markdown > docs/algorithms.md"


def test_describe_by_hand() -> None:
    info = describe("ppo")
    assert info.needs == ("reference", "values")
    assert [part.key for part in info.parts] == [
        "curriculum",
        "rollout",
        "combine",
        "advantage",
        "loss",
        "correction",
        "regularize",
        "aggregate",
    ]
    gae = info.parts[3]
    assert [(option.name, option.type, option.default) for option in gae.options] == [
        ("gamma", "float", 1.0),
        ("lam", "float", 0.95),
        ("whiten", "bool", True),
        ("eps", "float", 1e-8),
        ("extended", "bool", False),
        ("drop_last", "int", 0),
    ]
    assert gae.equation.splitlines()[0] == "delta_t = r_t + gamma * V_{t+1} - V_t"
    kl = info.parts[6]
    assert ("estimator", "k1 | k2 | k3", "k3") in [(option.name, option.type, option.default) for option in kl.options]
    ppo_clip = info.parts[4]
    assert ("dual_clip", "float or null", None) in [(o.name, o.type, o.default) for o in ppo_clip.options]


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ppo'"):
        describe("ppoo")
