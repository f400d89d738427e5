"""configs/sweep.yaml: what W&B's agent makes of it is a command that rlsys takes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from rlsys.config.loading import load_config
from rlsys.metrics.catalog import find

ROOT = Path(__file__).parents[2]
SWEEP: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
PARAMETERS: dict[str, dict[str, Any]] = SWEEP["parameters"]


def choices(parameter: dict[str, Any]) -> list[Any]:
    """Every value, or the ends of a range."""
    if "values" in parameter:
        return list(parameter["values"])
    return [parameter["value"]] if "value" in parameter else [parameter["min"], parameter["max"]]


TRIALS = [dict(zip(PARAMETERS, t, strict=True)) for t in itertools.product(*map(choices, PARAMETERS.values()))]


def command(trial: dict[str, Any]) -> list[str]:
    """As `wandb agent` makes it (`Agent._command_run`)."""
    variables = create_sweep_command_args({"args": {key: {"value": value} for key, value in trial.items()}})
    words: list[str] = []
    for word in create_sweep_command(SWEEP["command"]):
        words += variables[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return words


def test_every_trial_is_a_config() -> None:
    assert len(TRIALS) > 30
    for trial in TRIALS:
        config = load_config(ROOT / "configs" / "quickstart.yaml", command(trial)[len(SWEEP["command"]) - 1 :])
        values = config.model_dump(mode="json")
        for key, value in trial.items():
            found = values
            for name in key.split("."):
                found = found[name]
            assert found == value, key


def test_what_it_is_after_is_logged() -> None:
    assert find(SWEEP["metric"]["name"])


def test_the_shape_of_the_file() -> None:
    """By W&B's documentation; their service checks it once more."""
    assert SWEEP["method"] in ("bayes", "random", "grid")
    assert SWEEP["metric"]["goal"] in ("maximize", "minimize")
    for key, parameter in PARAMETERS.items():
        assert parameter.keys() in ({"values"}, {"value"}, {"distribution", "min", "max"}), key


@pytest.mark.slow
def test_the_command_itself_plans_a_run(tmp_path: Path) -> None:
    """The very words, with `plan` for `train`."""
    trial = TRIALS[-1]
    words = [word.replace("rlsys train", "rlsys plan") for word in command(trial)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_RUN_ID": "abc123",
        "COLUMNS": "200",
    }
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "sweep-abc123" in done.stdout
    assert str(trial["algorithm.preset"]) in done.stdout
