"""Reward functions that cannot be used are refused before a run starts, by a message that says which and why."""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlsys.config.models import RewardsConfig
from rlsys.errors import ConfigError, RewardSetupError
from rlsys.registry import discover
from rlsys.rewards import RewardFunction, functions
from rlsys.rewards.check import check
from rlsys.rewards.functions.python import Python
from rlsys.rewards.setup import build_functions, with_absolute_paths

USER_FUNCTIONS = Path(__file__).with_name("user_functions.py")
REQUIRED = {"python": {"path": "module:function"}}


def config(**function) -> RewardsConfig:
    return RewardsConfig.model_validate({"functions": [{"name": "mine", "kind": "python", **function}]})


@pytest.mark.parametrize("name", sorted(discover(functions, RewardFunction)))
def test_every_function_is_documented_and_travels_to_the_child(name):
    cls = discover(functions, RewardFunction)[name]
    assert inspect.getdoc(cls)
    assert pickle.loads(pickle.dumps(cls(**REQUIRED.get(name, {})))) == cls(**REQUIRED.get(name, {}))


def test_every_kind_of_the_config_is_there():
    kinds = RewardsConfig.model_fields["functions"].annotation.__args__[0].model_fields["kind"].annotation.__args__
    assert set(kinds) == set(discover(functions, RewardFunction))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ({"kind": "sums", "options": {"strict": 1}}, ConfigError, r"functions\[0\].options.strict: 'sums' has no such"),
        ({"kind": "math_verify", "options": {"extrct": []}}, ConfigError, r"did you mean 'extract'\?"),
        ({"kind": "math_verify", "options": {"extract": ["hsh"]}}, ConfigError, r"extract.0: .*'hash'.* \(got 'hsh'\)"),
        ({"kind": "sums", "path": "a:b"}, ConfigError, r"functions\[0\].path: only for kind python"),
        ({}, ConfigError, r"functions\[0\].path: kind python needs one"),
        ({"path": "module.function"}, RewardSetupError, "is not `module:function` or `file.py:function`"),
        ({"path": "missing/file.py:f"}, RewardSetupError, "there is no file missing/file.py"),
    ],
)
def test_bad_configuration_is_refused_without_a_process(function, error, message):
    with pytest.raises(error, match=message):
        build_functions(config(**function))


@pytest.mark.parametrize("bad", [[1, 0], [0], [0, math.inf], ["0", "x"]])
def test_a_range_is_two_numbers_in_order(bad):
    assert config(kind="sums", range=[0, 0]).functions[0].range == (0, 0)
    with pytest.raises(ValidationError, match="range"):
        config(kind="sums", range=bad)


def test_two_functions_of_one_name_are_refused():
    twice = {"functions": [{"name": "a", "kind": "sums"}, {"name": "a", "kind": "sums"}]}
    with pytest.raises(ConfigError, match=r"functions\[1\].name: 'a' is used twice"):
        build_functions(RewardsConfig.model_validate(twice))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenght", {}, r"user_functions.py has no 'lenght' \(did you mean 'length'\?\)"),
        ("barrier", {}, "user_functions.py:barrier is a Barrier, not a function"),
        ("Callable", {}, "user_functions.py:Callable is a class, not a function"),
        ("needs_more", {}, r"needs an argument 'answr' \(did you mean 'answer'\?\)"),
        ("positional", {}, "has positional-only parameters"),
        ("length", {"scale": 2}, "takes no argument 'scale', but options give one"),
        ("length", {"response": ""}, "the option 'response' of .* is taken"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(name, options, message):
    with pytest.raises(RewardSetupError, match=message):
        Python(f"{USER_FUNCTIONS}:{name}", options).prepare()


def test_functions_that_do_not_exist_are_refused_at_the_start():
    with pytest.raises(RewardSetupError, match=r"mine: cannot be imported: ModuleNotFoundError: .*'no_such_module_x'"):
        check(config(path="no_such_module_x:f"))
    with pytest.raises(RewardSetupError, match=r"rewards.functions: mine: .*user_functions.py has no 'lenght'"):
        check(config(path=f"{USER_FUNCTIONS}:lenght"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(:", r"cannot be imported: SyntaxError: invalid syntax"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*broken.py:1\)"),
        ("import sys; sys.exit(3)", r"cannot be imported: SystemExit: 3"),
        ("import os; os._exit(3)", r"the process died while importing them \(exit code 3\)"),
        ("while True: pass", r"mine: not imported within rewards.start_timeout_s = 1"),
    ],
)
def test_files_that_cannot_be_imported_are_refused_at_the_start(source, message, tmp_path):
    (tmp_path / "broken.py").write_text(source)
    hurried = config(path=f"{tmp_path / 'broken.py'}:score").model_copy(update={"start_timeout_s": 1.0})
    patient = hurried.model_copy(update={"start_timeout_s": 60.0})
    with pytest.raises(RewardSetupError, match=message):
        check(hurried if "while" in source else patient)


def test_the_working_directory_is_searched_and_neighbours_are_found(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_mine.py").write_text("value = 1")
    program = "from neighbour_of_mine import value\ndef score(response): return value"
    (tmp_path / "rewards_of_mine.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    check(config(path="rewards_of_mine:score"))
    check(config(path="rewards_of_mine.py:score"))
    monkeypatch.chdir(tmp_path.parent)
    check(config(path=f"{tmp_path / 'rewards_of_mine.py'}:score"))


def test_relative_files_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = [{"name": "a", "kind": "python", "path": "mine.py:f"}, {"name": "b", "kind": "python", "path": "pkg.mine:f"}]
    absolute = with_absolute_paths(RewardsConfig.model_validate({"functions": two}))
    assert [f.path for f in absolute.functions] == [f"{tmp_path / 'mine.py'}:f", "pkg.mine:f"]


def test_a_task_without_a_function_is_refused():
    only = RewardsConfig.model_validate({"functions": [{"name": "right", "kind": "sums", "tasks": ["sums"]}]})
    check(only, tasks=["sums"])
    with pytest.raises(ConfigError, match="none applies to the task 'gsm8k'"):
        check(only, tasks=["sums", "gsm8k"])


def test_a_function_that_can_no_longer_be_imported_ends_the_wait(tmp_path, group):
    """Its file broke while the run was going on, and its process has to be started anew."""
    from rlsys.rewards.worker import RewardWorker

    file = tmp_path / "fragile.py"
    file.write_text("import os\ndef score(response): os._exit(1)")

    async def run():
        worker = RewardWorker(config(path=f"{file}:score"))
        await worker.start()
        file.write_text("1 / 0")
        try:
            for _ in range(2):
                with pytest.raises(RewardSetupError, match="ZeroDivisionError"):
                    await worker.score(group("a"))
        finally:
            await worker.close()

    asyncio.run(run())
