"""From a config to a composition, and what cannot be composed."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from rlsys.algorithms import Algorithm, Needs
from rlsys.algorithms.presets import presets
from rlsys.config.models import AlgorithmConfig
from rlsys.errors import ConfigError, LearnerError
from rlsys.types import GroupInfo


def compose(**config: Any) -> Algorithm:
    return Algorithm.from_config(AlgorithmConfig.model_validate(config))


NEEDS = {
    "grpo": Needs(reference=True, values=False, proximal=False, entropy=False),
    "dr-grpo": Needs(reference=False, values=False, proximal=False, entropy=False),
    "rloo": Needs(reference=True, values=False, proximal=False, entropy=False),
    "reinforce-baseline": Needs(reference=False, values=False, proximal=False, entropy=False),
    "ppo": Needs(reference=True, values=True, proximal=False, entropy=False),
    "dapo-bytedance": Needs(reference=False, values=False, proximal=False, entropy=False),
    "grpo-decoupled": Needs(reference=False, values=False, proximal=True, entropy=False),
}


@pytest.mark.parametrize("name", presets())
def test_every_preset_composes_pickles_and_composes_again_from_what_it_resolves_to(name: str) -> None:
    algorithm = compose(preset=name)
    if name in NEEDS:
        assert algorithm.needs == NEEDS[name]
    resolved = algorithm.resolved()
    assert pickle.loads(pickle.dumps(algorithm)).resolved() == resolved
    again = {key: value for key, value in resolved.items() if key != "critic" or value is not None}
    assert compose(**again).resolved() == resolved


def test_the_presets_of_the_plan_are_there() -> None:
    assert set(NEEDS) <= set(presets())


def test_grpo_by_default() -> None:
    assert compose().resolved() == {
        "preset": "grpo",
        "curriculum": {"name": "in-order"},
        "rollout": {"name": "plain"},
        "combine": {"name": "weighted-sum"},
        "advantage": {"name": "grpo", "std": True, "eps": 1e-6, "shift": 0.0},
        "adjust": [],
        "filter": [],
        "loss": {"name": "ppo-clip", "low": 0.2, "high": 0.2, "dual_clip": None},
        "correction": {"name": "none"},
        "regularize": [{"name": "kl", "coefficient": 0.04, "estimator": "k3", "in_reward": False, "final": None}],
        "aggregate": {"name": "sequence-mean-token-mean"},
        "epochs": 1,
        "minibatches": 1,
        "critic": None,
    }


def test_options_without_a_name_or_with_the_same_one_change_only_those_of_the_presets_part() -> None:
    for loss in ({"low": 0.1}, {"name": "ppo-clip", "low": 0.1}):
        resolved = compose(preset="dapo-bytedance", loss=loss).resolved()
        assert resolved["loss"] == {"name": "ppo-clip", "low": 0.1, "high": 0.28, "dual_clip": None}


def test_another_part_starts_from_its_own_defaults() -> None:
    resolved = compose(preset="grpo-decoupled", correction={"name": "truncated-importance"}).resolved()
    assert resolved["correction"] == {"name": "truncated-importance", "cap": 2.0}


def test_lists_are_replaced_whole() -> None:
    assert compose(regularize=[]).needs.reference is False
    both = compose(regularize=[{"name": "entropy"}, {"name": "kl", "estimator": "k2"}])
    assert [part.name for part in both.regularizers] == ["entropy", "kl"]
    assert both.needs == Needs(reference=True, values=False, proximal=False, entropy=True)


def test_critic_options_change_only_those_of_the_presets_critic() -> None:
    critic = compose(preset="ppo", critic={"learning_rate": 3e-5}).critic
    assert critic is not None
    assert (critic.learning_rate, critic.value_clip) == (3e-5, 0.2)
    assert compose(preset="grpo", advantage={"name": "gae"}, critic={}).needs.values


def test_the_presets_critic_goes_with_its_estimator() -> None:
    algorithm = compose(preset="ppo", advantage={"name": "rloo"})
    assert algorithm.critic is None
    assert not algorithm.needs.values


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": "grop"}, r"^algorithm\.preset: no 'grop' \(did you mean 'grpo'\?\); there are .*ppo"),
        ({"loss": {"name": "ppo-clap"}}, r"^algorithm\.loss\.name: no 'ppo-clap' \(did you mean 'ppo-clip'\?\)"),
        ({"loss": {"lwo": 0.1}}, r"^algorithm\.loss\.lwo: 'ppo-clip' has no such option \(did you mean 'low'\?\)"),
        ({"loss": {"low": 1.5}}, r"^algorithm\.loss\.low: .*less than or equal to 1 \(got 1\.5\)"),
        ({"loss": {"dual_clip": 0.5}}, r"^algorithm\.loss\.dual_clip: .*greater than 1"),
        ({"advantage": {"std": "perhaps"}}, r"^algorithm\.advantage\.std: .*boolean"),
        ({"regularize": [{"coefficient": 0.1}]}, r"^algorithm\.regularize\.0\.name: missing"),
        ({"regularize": [{"name": "kl", "estimator": "k4"}]}, r"^algorithm\.regularize\.0\.estimator: .*'k1'"),
        ({"filter": [{"name": "zero-variance", "tolerance": -1}]}, r"^algorithm\.filter\.0\.tolerance: "),
        ({"advantage": {"name": "gae"}}, r"^algorithm\.critic: 'gae' works with a critic's values"),
        (
            {"curriculum": {"name": "predicted-difficulty"}},
            r"^algorithm\.curriculum: .* add the adjustment prompt-value",
        ),
        (
            {"curriculum": {"name": "entropy-target"}},
            r"^algorithm\.curriculum: .* add the adjustment explored-successes",
        ),
        ({"critic": {}}, r"^algorithm\.critic: the advantage 'grpo' does not use a critic"),
        ({"preset": "ppo", "advantage": {"gamma": 1.1}}, r"^algorithm\.advantage\.gamma: "),
    ],
)
def test_mistakes_name_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(**config)


def info(*scores: float) -> GroupInfo:
    return GroupInfo("p", 0, "generator-0", (1,) * len(scores), 0, 0, scores=scores)


def test_filters() -> None:
    nan = float("nan")
    dapo = compose(preset="dapo-bytedance")
    assert dapo.drop_reason(info(1.0, 1.0, 1.0)) == "zero variance"
    assert dapo.drop_reason(info(1.0, nan, 1.0)) == "zero variance"
    assert dapo.drop_reason(info(nan, nan)) == "no scored rollout"
    assert dapo.drop_reason(info(1.0, 0.0, nan)) is None
    assert compose().drop_reason(info(1.0, 1.0)) is None
    loose = compose(filter=[{"name": "zero-variance", "tolerance": 0.1}])
    assert loose.drop_reason(info(0.5, 0.55)) == "zero variance"
    assert loose.drop_reason(info(0.5, 0.75)) is None


def test_state_is_restored_and_belongs_to_one_estimator() -> None:
    algorithm = compose(preset="reinforce-baseline")
    algorithm.estimator.load_state_dict({"baseline": 0.25, "seen": 8})
    other = compose(preset="reinforce-baseline")
    other.load_state_dict(algorithm.state_dict())
    assert other.state_dict() == algorithm.state_dict()
    with pytest.raises(LearnerError, match="made with advantage reinforce; the config has grpo"):
        compose().load_state_dict(algorithm.state_dict())
