"""A node of the cluster is lost in the middle of a run, and another one comes: the run goes on."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from rlsys.ledger.story import read_run

from .conftest import CONFIGS, RUN_TIMEOUT_S, SMALL, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NODE = {"num_cpus": 2, "object_store_memory": 150 * 2**20}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three raylets on this machine. The driver is at home at the first."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def roles_on(node: Any) -> list[str]:
    """The actors of the run whose processes a raylet has started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    titles = [" ".join(child.cmdline()) for child in raylet.children()]
    kinds = ("Generator", "Reward", "Reference", "Learner")
    return [title for title in titles if title.startswith(tuple(f"ray::{kind}Actor" for kind in kinds))]


def test_what_a_lost_node_held_is_made_or_read_again(
    cluster: Cluster, start: Callable[..., subprocess.Popen[str]], workplace: Path
) -> None:
    process = start(
        *("train", str(CONFIGS / "quickstart.yaml"), *SMALL, "--run.name", "node", "--run.steps", "12"),
        *("--rollout.generators", "2", "--rewards.workers", "2", "--checkpoint.every", "3"),
        *("--resources.ray_address", cluster.address, "--driver.max_staleness", "2"),
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if re.search(r"\bstep +4/", line):
            break
    else:
        pytest.fail("".join(said))
    others = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    lost = max(others, key=lambda node: len(roles_on(node)))
    had = roles_on(lost)
    assert had, "nothing was placed away from the head: " + "".join(said)
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(**NODE)
    rest, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    output = "".join(said) + rest
    assert process.returncode == 0, output
    run = workplace / "runs" / "node"
    assert summary(run)["fates"] == {"trained": 12 * 8, "dropped": {}, "pending": 0}
    story = read_run(run)
    assert [step["prompts"] for step in story.steps] == [8] * 12
    lost_roles = {note.detail["worker"].partition("-")[0] for note in story.notes if note.event == "worker lost"}
    assert lost_roles, output
    assert all(any(title.startswith(f"ray::{role[:6].title()}") for title in had) for role in lost_roles)
