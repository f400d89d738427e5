"""What the README says to type works: commands, configs and code are taken from its text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlsys import advantages

REPO = Path(__file__).parents[2]
README = (REPO / "README.md").read_text("utf-8")
TRAIN = re.findall(r"^    rlsys train (configs/\S+.*)$", README, re.MULTILINE)


def block(language: str, containing: str) -> str:
    """The one fenced block of that language with that text in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    [found] = [text for text in blocks if containing in text]
    return str(found)


def arguments(command: str) -> list[str]:
    return [str(REPO / word) if word.startswith("configs/") else word for word in command.split()]


@pytest.mark.parametrize("command", [command for command in TRAIN if "centred" not in command])
def test_runs_that_it_shows_can_be_planned(rlsys: Callable, command: str) -> None:
    assert TRAIN
    done = rlsys("plan", *arguments(command))
    assert done.code == 0, done.err


def test_files_and_targets_that_it_names_are_there() -> None:
    names = set(re.findall(r"`((?:docs|configs|rlsys)/[\w/.-]+)`", README))
    assert names
    assert [name for name in names if not (REPO / name).exists()] == []
    targets = re.findall(r"^(\w[\w-]*):", (REPO / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^    make (\S+)", README, re.MULTILINE)) <= set(targets)


@pytest.fixture
def own_data(tmp_path: Path, tiny_model: Path) -> Path:
    """The config of "Your own data and model", with files of that shape."""
    config = yaml.safe_load(block("yaml", "path/to/a/huggingface/folder"))
    config["model"] = {"path": str(tiny_model), "max_length": 256}
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"question": "1+2?", "answer": "3"}) + "\n")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
def test_its_data_and_its_reward_function(rlsys: Callable, own_data: Path, tmp_path: Path) -> None:
    code = block("python", "def short_and_right")
    (tmp_path / "my_rewards.py").write_text(code)
    config = yaml.safe_load(own_data.read_text()) | yaml.safe_load(block("yaml", "my_rewards.py"))
    own_data.write_text(yaml.safe_dump(config))
    done = rlsys("plan", own_data)  # which imports the function and checks its options
    assert done.code == 0, done.err
    scope: dict = {}
    exec(code, scope)
    assert scope["short_and_right"]("it is 3 ", "3") == 1
    assert scope["short_and_right"]("it is 3", "3", limit=2) == 0.9


def test_its_estimator(rlsys: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "more_advantages"
    folder.mkdir()
    (folder / "centred.py").write_text(block("python", "class Centred"))
    monkeypatch.setattr(advantages, "__path__", [*advantages.__path__, str(folder)])
    [command] = [command for command in TRAIN if "centred" in command]
    done = rlsys("plan", *arguments(command))
    assert done.code == 0, done.err
    assert "centred" in done.out
