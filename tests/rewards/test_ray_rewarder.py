"""Reward workers as Ray actors."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import ray

from rlsys.config.models import RewardsConfig
from rlsys.errors import BadRollout, RewardError, RewardSetupError, RolloutError, WorkerDied
from rlsys.rewards.worker import default_search_path
from rlsys.segments.strategies.plain import Plain

pytestmark = pytest.mark.slow

SUMS = RewardsConfig.model_validate({"functions": [{"name": "right", "kind": "sums"}]})


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 1024 * 1024)
    yield
    ray.shutdown()


@pytest.fixture
async def start():
    from rlsys.actors.rewards import start_rewarder

    started = []

    async def start(config=SUMS, **options):
        started.append(await start_rewarder(f"rewards-{len(started)}", config, **options))
        return started[-1]

    yield start
    for rewarder in started:
        await rewarder.close()


async def test_the_driver_gets_the_facts_and_a_reference(group, start):
    rewarder = await start()
    given = group("22,45", "46", answer="45", row=4)
    scored = await rewarder.score([[ray.put(given)]], training=False)
    assert (rewarder.name, scored.info.prompt_id, scored.info.index) == ("rewards-0", "sums/4@0", 4)
    assert scored.info.scores == (1.0, 0.0)
    assert scored.info.reward_statuses == ("ok", "ok")
    assert scored.seconds > 0
    assert isinstance(scored.payload, ray.ObjectRef)
    payload = await scored.payload
    np.testing.assert_array_equal(payload.scores, [1, 0])
    assert [r.text for r in payload.rollouts] == ["22,45", "46"]


async def test_errors_keep_their_type(group, start, user_config):
    bad = {"functions": [{"name": "mine", "kind": "python", "path": "no_such_module_x:f"}]}
    with pytest.raises(RewardSetupError, match=r"^rewards.functions: mine: cannot be imported: .*'no_such_module_x'$"):
        await start(RewardsConfig.model_validate(bad))
    rewarder = await start(user_config("raises", on_failure="stop"))
    with pytest.raises(RewardError, match=r"^rewards.on_failure is stop, and scoring sums/0@0#0 failed"):
        await rewarder.score([[ray.put(group("a"))]], training=False)


async def test_a_group_that_cannot_be_right_is_refused_in_the_name_of_its_generator(group, start):
    good = group("45", "46", answer="45", row=4)
    broken = replace(good.rollouts[1], behavior_logprobs=np.array([-1, np.nan], np.float32))
    bad = replace(good, rollouts=(good.rollouts[0], broken))
    where = r"generator-0, as rewards-. received it: prompt sums/4@0, sample 1: the log-prob of response token 1 is nan"
    rewarder = await start(strategy=Plain())
    for rounds in ([[ray.put(bad)]], [[ray.put(good)], [ray.put(good), ray.put(bad)]]):
        with pytest.raises(BadRollout, match=f"^{where}") as caught:
            await rewarder.score(rounds, training=True)
        assert (caught.value.kind, caught.value.generator) == ("log-probs", "generator-0")
        with pytest.raises(BadRollout, match=f"^{where}"):
            await rewarder.branch(rounds)
    assert (await rewarder.score([[ray.put(good)]], training=True)).info.scores == (1.0, 0.0)
    rewarder = await start(on_refused="stop")
    with pytest.raises(RolloutError, match=where):
        await rewarder.score([[ray.put(bad)]], training=True)


async def test_functions_are_found_from_the_drivers_directory(group, start, tmp_path, monkeypatch):
    (tmp_path / "rewards_here.py").write_text("def score(response): return len(response)")
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) in default_search_path()
    for path in ("rewards_here.py:score", "rewards_here:score"):
        rewarder = await start(
            RewardsConfig.model_validate({"functions": [{"name": "mine", "kind": "python", "path": path}]})
        )
        assert (await rewarder.score([[ray.put(group("abc"))]], training=False)).info.scores == (3.0,)


async def test_a_dead_worker_is_named_and_leaves_no_process(group, start, user_config, wait_until_gone, tmp_path):
    file = tmp_path / "tells.py"
    file.write_text("import os\ndef score(): return os.getpid()")
    functions = [{"name": "mine", "kind": "python", "path": f"{file}:score"}]
    rewarder = await start(RewardsConfig.model_validate({"functions": functions}))
    child = int((await rewarder.score([[ray.put(group("a"))]], training=False)).info.scores[0])
    ray.kill(rewarder.actor)
    with pytest.raises(WorkerDied, match="rewards-0 died") as died:
        await rewarder.score([[ray.put(group("a"))]], training=False)
    assert died.value.worker == "rewards-0"
    assert wait_until_gone(child, 20)


@pytest.mark.parametrize("stopped", ["nothing", "the worker", "the child"])
async def test_closing_leaves_no_process(group, start, wait_until_gone, tmp_path, stopped):
    file = tmp_path / "tells.py"
    file.write_text("import os\ndef score(): return os.getpid()")
    functions = [{"name": "mine", "kind": "python", "path": f"{file}:score"}]
    rewarder = await start(RewardsConfig.model_validate({"functions": functions}))
    child = int((await rewarder.score([[ray.put(group("a"))]], training=False)).info.scores[0])
    [report] = await rewarder.inspect()
    assert f"process {child}" in report.stacks
    if stopped != "nothing":
        os.kill(report.pid if stopped == "the worker" else child, signal.SIGSTOP)
    await rewarder.close()
    assert wait_until_gone(child, 20)
    assert wait_until_gone(report.pid, 20)
    await rewarder.close()  # closing twice does no harm


async def test_a_child_that_dies_at_its_start_has_its_last_words_told(start, tmp_path):
    file = tmp_path / "fails.py"
    file.write_text("import os\nprint('no licence for this library', flush=True)\nos._exit(9)")
    functions = [{"name": "mine", "kind": "python", "path": f"{file}:score"}]
    with pytest.raises(RewardSetupError) as caught:
        await start(RewardsConfig.model_validate({"functions": functions}))
    assert str(caught.value).splitlines() == [
        "rewards.functions: the process died while importing them (exit code 9)",
        "rewards-0's last output:",
        "  no licence for this library",
    ]
