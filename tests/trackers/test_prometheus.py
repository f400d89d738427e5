"""Gauges as Ray exports them: read from the metrics endpoint of a real node."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterator

import pytest

from rlsys.metrics.catalog import DEFINITIONS
from rlsys.metrics.pages import exported_name
from rlsys.trackers.prometheus import PrometheusTracker


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Address of the metrics of a Ray node of one CPU."""
    import ray

    ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        [node] = [node for node in ray.nodes() if node["Alive"]]
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    finally:
        ray.shutdown()


async def exported(endpoint: str, contains: str) -> str:
    """What the endpoint says, once it says that. Ray hands its metrics on every few seconds."""
    async with asyncio.timeout(60):
        while True:
            with urllib.request.urlopen(endpoint) as answer:  # noqa: ASYNC210
                text = answer.read().decode()
            if contains in text:
                return str(text)
            await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_names_tags_and_values(endpoint: str) -> None:
    tracker = PrometheusTracker("quick")
    tracker.log_step(1, {"reward/mean": 0.25, "time/step_s": 2.0, "restarts/generator": 1.0})
    tracker.log_eval(1, {"accuracy": 0.125})
    tracker.log_step(2, {"reward/mean": 0.5, "time/step_s": 2.5, "mine/own": 7.0})
    text = await exported(endpoint, "rlsys_mine_own")
    values = {
        match[1]: float(match[3])
        for match in re.finditer(r"^(ray_rlsys_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        if 'run="quick"' in match[2]
    }
    assert values == {
        "ray_rlsys_reward_mean": 0.5,
        "ray_rlsys_time_step_seconds": 2.5,
        "ray_rlsys_restarts_generator": 1.0,
        "ray_rlsys_eval_accuracy": 0.125,
        "ray_rlsys_mine_own": 7.0,
    }
    # the dashboard asks for these names
    asked = [re.compile(exported_name(d)) for d in DEFINITIONS]
    assert [n for n in values if not any(a.fullmatch(n) for a in asked)] == ["ray_rlsys_mine_own"]
