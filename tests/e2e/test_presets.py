"""Three steps of every preset through real vLLM, rewards, reference and DeepSpeed, and its own metrics in the log."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsys.algorithms import describe
from rlsys.algorithms.presets import presets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

REWARDS = '''
def correct(response: str, answer: str) -> float:
    """Something that an untrained model gets right about half of the time."""
    return float(sum(map(ord, response)) % 2)


def difficulty(response: str, answer: str) -> float:
    return 1.0 + len(response) / 12
'''


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("presets")
    (folder / "rewards.py").write_text(REWARDS)
    program = Path(__file__).with_name("presets_program.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tiny_model), str(folder / "rewards.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"preset"')]
    return {line["preset"]: line for line in lines}


@pytest.mark.parametrize("preset", presets())
def test_three_steps(results: dict[str, dict[str, Any]], preset: str) -> None:
    result = results[preset]
    assert "error" not in result, result["error"]
    steps = result["steps"]
    assert len(steps) == 3
    assert all(difference <= 1e-4 for difference in result["differences"]), "sampler and learner agree at every version"
    assert result["state"], "the memory survives JSON"
    for step in steps:
        assert all(math.isfinite(value) for name, value in step.items() if name != "skipped")
        assert step["skipped"] is None
        assert step["learner/tokens"] > 0
    logged = {name for step in steps for name in step}
    info = describe(preset)
    in_reward = {part["name"] for part in info.composition["regularize"] if part.get("in_reward")}
    for part in info.parts:
        if part.metrics and part.name not in in_reward:  # those in the loss measure
            patterns = [re.sub(r"\\{.*?\\}", ".+", re.escape(name)) for name in part.metrics]
            assert any(re.fullmatch(pattern, name) for pattern in patterns for name in logged), (
                f"{part.key} {part.name} logged none of {part.metrics}"
            )
