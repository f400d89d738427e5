"""Loading a config: what is right is read exactly, what is wrong is named with its place and the nearest valid key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rlsys.config.loading import all_keys, dump_config, load_config
from rlsys.errors import ConfigError

MINIMAL = """\
model:
  tiny: {layers: 2}
prompts:
  train:
    kind: sums
rewards:
  functions:
    - {name: right, kind: sums}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- what is right ------------------------------------------------------------------------------------------------


def test_defaults_and_run_directory(config_file: Path) -> None:
    config = load_config(config_file, ["--run.name", "seven"])
    assert config.run.dir == "runs/seven"
    assert config.model.tiny is not None
    assert config.model.tiny.layers == 2
    assert config.driver.max_staleness == 1


def test_override_forms(config_file: Path) -> None:
    config = load_config(
        config_file,
        [
            "--algorithm.loss.low", "0.2",
            "--algorithm.loss.name=ppo_clip",
            "--driver.max_staleness=0",
            "--rewards.functions.0.weight", "-1.5",
            "--learner.optimizer.learning_rate", "1e-6",
            "--rollout.stop", '["\\n", "="]',
            "--prompts.eval", "{kind: sums, seed: 7}",
            "--eval.every_prompts=null",
            "--prompts.instruction", "no",
        ],
    )  # fmt: skip
    assert config.algorithm.loss is not None
    assert (config.algorithm.loss.name, config.algorithm.loss.options) == ("ppo_clip", {"low": 0.2})
    assert config.driver.max_staleness == 0
    assert config.rewards.functions[0].weight == -1.5
    assert config.learner.optimizer.learning_rate == 1e-6
    assert config.rollout.stop == ("\n", "=")
    assert config.prompts.eval is not None
    assert config.prompts.eval.seed == 7  # type: ignore[union-attr]
    assert config.eval.every_prompts is None
    assert config.prompts.instruction == "no"


def test_extends_merges_and_replaces_another_kind(tmp_path: Path, config_file: Path) -> None:
    child = write(
        tmp_path / "child.yaml",
        "extends: c.yaml\nmodel: {tiny: {heads: 2}}\nprompts: {train: {kind: jsonl, path: a.jsonl}}\n",
    )
    config = load_config(child)
    assert config.model.tiny is not None
    assert (config.model.tiny.layers, config.model.tiny.heads) == (2, 2)
    assert config.prompts.train.kind == "jsonl"


def test_an_error_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path / "c.yaml", MINIMAL + "driver: {max_stalness: 1}\n")
    child = write(tmp_path / "child.yaml", "extends: c.yaml\n")
    assert error_of(child).startswith(
        "c.yaml, line 9: driver.max_stalness: unknown key (did you mean 'max_staleness'?)"
    )


def leaves(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted leaf keys of a config, written without the code under test."""
    found: dict[str, Any] = {}
    for name, value in model:
        if isinstance(value, BaseModel):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


OVERRIDES = {
    "run.seed": st.integers(0, 2**40),
    "run.name": st.from_regex(r"\A[A-Za-z][A-Za-z0-9._-]{0,20}\Z").filter(
        lambda s: s.lower() not in ("true", "false", "null")
    ),
    "rollout.temperature": st.floats(1e-300, 1e300),
    "rollout.stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6)).map(tuple),
    "learner.optimizer.eps": st.floats(1e-300, 1),
    "learner.optimizer.betas": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "prompts.instruction": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    "trackers.timeline": st.booleans(),
    "rewards.functions.0.options": st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
                st.characters(exclude_categories=["Cs"]), max_size=5
            ),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abn"), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
}  # fmt: skip


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_overrides_are_read_as_given_and_survive_dump_and_load(config_file: Path, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(OVERRIDES)), unique=True))
    values = {key: data.draw(OVERRIDES[key], label=key) for key in keys}
    arguments = []
    for key, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value
        arguments += [f"--{key}={json.dumps(plain)}"]
    config = load_config(config_file, arguments)
    have = leaves(config) | {"rewards.functions.0.options": config.rewards.functions[0].options}
    for key, value in values.items():
        assert have[key] == value, key
    resolved = config_file.with_name("resolved.yaml")
    dump_config(config, resolved)
    assert load_config(resolved) == config
    assert [p.name for p in resolved.parent.glob("*.partial")] == []


def test_a_dumped_config_reads_the_same_with_a_plain_yaml_reader(config_file: Path) -> None:
    config = load_config(config_file, ["--learner.optimizer.learning_rate=1e-6", "--prompts.instruction", "on"])
    resolved = config_file.with_name("resolved.yaml")
    dump_config(config, resolved)
    plain = yaml.safe_load(resolved.read_text())
    assert plain["learner"]["optimizer"]["learning_rate"] == 1e-6
    assert plain["prompts"]["instruction"] == "on"


def test_all_keys_has_every_leaf(config_file: Path) -> None:
    keys = all_keys()
    assert set(leaves(load_config(config_file))) <= set(keys)
    assert {"prompts.train.prompt_key", "prompts.eval.dataset", "algorithm.critic.value_clip"} <= set(keys)


# ---- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("driver:\n  max_stalness: 1\n", r"c\.yaml, line 10: driver\.max_stalness: unknown key .*'max_staleness'"),
        ("drivers: {}\n", r"c\.yaml, line 9: drivers: unknown key \(did you mean 'driver'\?\)"),
        ("learning_rate: 1\n", r"line 9: learning_rate: unknown key here .*'learner\.optimizer\.learning_rate'"),
        ("rollout: {max_new_tokens: many}\n", r"line 9: rollout\.max_new_tokens: must be an integer; got 'many'"),
        ("rollout: {max_new_tokens: 0}\n", r"line 9: rollout\.max_new_tokens: must be greater than 0; got 0"),
        ("rollout: {max_new_tokens: true}\n", r"line 9: rollout\.max_new_tokens: must be an integer; got true"),
        ("rollout: {max_new_tokens: null}\n", r"line 9: rollout\.max_new_tokens: must be an integer; got null"),
        ("rollout: {temperature: .inf}\n", r"line 9: rollout\.temperature: must be a finite number; got Infinity"),
        ("rollout: {stop: [1]}\n", r"line 9: rollout\.stop\.0: must be a string; got 1 \(quote it"),
        ("run: {resume: atuo}\n", r"run\.resume: must be 'auto' or 'never'; got 'atuo' \(did you mean 'auto'\?\)"),
        ("run: {name: a/b}\n", r"line 9: run\.name: 'a/b' must match"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", r"c\.yaml, line 10: run: the key is there twice"),
        ("run: {seed: 1\n", r"c\.yaml, line 10, column 1: not valid YAML: "),
        ("run: [1\n\n\n  }\n", r"c\.yaml, line 12, column 3: not valid YAML: "),
        ("extends: nowhere.yaml\n", r"c\.yaml, line 9: extends: no file .*nowhere\.yaml"),
        ("extends: c.yaml\n", r"c\.yaml, line 9: extends: .*circle"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(config_file: Path, yaml_text: str, message: str) -> None:
    config_file.write_text(MINIMAL + yaml_text)
    assert re.search(message, error_of(config_file))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: sums\nr", "kind: jsonll\nr", r"line 5: prompts\.train\.kind: no 'jsonll' \(did you mean 'jsonl'\?\)"),
        ("kind: sums\nr", "seed: 1\nr", r"line 4: prompts\.train\.kind: is missing; it is one of sums, jsonl, hugg"),
        ("kind: sums\nr", "kind: sums\n    larges: 1\nr", r"line 6: prompts\.train\.larges: .*'largest'"),
        ("kind: sums}", "knd: sums}", r"line 8: rewards\.functions\.0\.kind: is missing"),
        ("    - {name: right, kind: sums}", "    []", r"line 7: rewards\.functions: must have at least one element"),
        ("model:\n  tiny: {layers: 2}\n", "", r"c\.yaml: model: is missing"),
    ],
)
def test_mistakes_in_place_of_something(config_file: Path, old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    config_file.write_text(MINIMAL.replace(old, new))
    assert re.search(message, error_of(config_file))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--driver.max_stalnes", "0"], r"^command line: driver\.max_stalnes: unknown key .*'max_staleness'"),
        (["--driver.max_staleness", "-1"], r"^command line: driver\.max_staleness: must be greater than or equal to 0"),
        (["--rewards.functions.3.weight", "1"], r"rewards\.functions is a list of 1; give a place from 0 to 0"),
        (["--run.seed.x", "1"], r"--run\.seed\.x: run\.seed is 5, which has no keys below it"),
        (["--run.seed"], r"--run\.seed has no value"),
        (["--run.seed", "--run.name", "a"], r"--run\.seed has no value"),
        (["run.seed=1"], r"'run\.seed=1': expected `--dotted\.key value`"),
        (["--run..seed", "1"], r"not a dotted key"),
        (["--run.name", "[1"], r"command line, --run\.name, line 1, column 3: not valid YAML"),
    ],
)
def test_mistakes_on_the_command_line(config_file: Path, overrides: list[str], message: str) -> None:
    config_file.write_text(MINIMAL + "run: {seed: 5}\n")
    assert re.search(message, error_of(config_file, *overrides))


def test_all_mistakes_are_told_at_once(config_file: Path) -> None:
    config_file.write_text(MINIMAL + "run: {seed: -1, nmae: x}\n")
    assert len(error_of(config_file, "--driver.max_staleness", "x").splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"c\.yaml: no such config file"),
        ("", r"c\.yaml: is empty"),
        ("- 1\n", r"c\.yaml: holds a list; a config is a mapping"),
        ("? [a]\n: 1\n", r"c\.yaml, line 1: a key must be a word"),
    ],
)
def test_what_is_no_config_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    assert re.search(message, error_of(path))
