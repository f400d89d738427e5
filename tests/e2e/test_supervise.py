"""`rlsys train --supervise` over every real part: the driver is killed in mid-run, and the run ends all the same."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlsys.config.loading import load_config
from rlsys.driver.control import ask
from rlsys.errors import ConfigError

from .conftest import CONFIGS, RUN_TIMEOUT_S, SMALL, metrics, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


async def scale(run: Path) -> tuple[dict[str, Any], str]:
    """What is said to a second reward worker, and to more of them than the machine can have."""
    scaled = await ask(run, {"ask": "scale", "sizes": {"reward_workers": 2}})
    with pytest.raises(ConfigError) as refused:
        await ask(run, {"ask": "scale", "sizes": {"reward_workers": 4 * (os.cpu_count() or 1) + 2}})
    return scaled, str(refused.value)


def test_a_killed_driver_is_replaced(start: Callable[..., subprocess.Popen[str]], workplace: Path) -> None:
    process = start(
        *("train", str(CONFIGS / "quickstart.yaml"), *SMALL, "--supervise", "--run.name", "supervised"),
        *("--run.steps", "6", "--checkpoint.every", "2", "--eval.before", "false", "--eval.after", "false"),
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if re.match(r"step +3/6\b", line):
            scaled, refused = asyncio.run(scale(workplace / "runs" / "supervised"))
            [driver] = psutil.Process(process.pid).children()
            family = [driver, *driver.children(recursive=True)]
            # as if it hung: what the driver leaves behind is to be ended all the same
            next(p for p in family if "EngineCore" in p.name() or "VLLM" in p.name()).suspend()
            driver.kill()
            break
    else:
        pytest.fail("".join(said))
    said.append(process.communicate(timeout=RUN_TIMEOUT_S)[0])
    assert process.returncode == 0, "".join(said)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"left behind: {alive}"

    run = workplace / "runs" / "supervised"
    assert scaled == {"said": ["rewards.workers: 1 -> 2"]}
    assert re.search(r"rewarder: \d+ of \d+ workers have a place", refused), "one machine is full at some point"
    assert load_config(run / "config.yaml").rewards.workers == 2, "the new driver has the sizes of the old one"
    [restart] = (run / "supervise.log").read_text().splitlines()
    assert re.search(r"the driver was killed by SIGKILL at step 3; restart 1 of 3", restart)
    assert restart[20:] in said[-1]
    assert [line["step"] for line in metrics(run) if "learner/loss" in line] == [1, 2, 3, 4, 5, 6]
    fates = summary(run)["fates"]
    assert (fates["trained"], fates["pending"], fates["dropped"]) == (6 * 8, 0, {})
