"""Reward workers with real child processes: every way in which a function can go wrong, and what is left standing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlsys.config.models import RewardsConfig
from rlsys.errors import ConfigError, RewardError
from rlsys.rewards.worker import RewardWorker

SUMS = RewardsConfig.model_validate({"functions": [{"name": "right", "kind": "sums"}]})


async def test_scores_the_builtin_sums(group, start_worker):
    worker = await start_worker(SUMS)
    scored = await worker.score(group("22,45", "45", "22,46", "", "nonsense", answer="45"))
    np.testing.assert_array_equal(scored.scores, [1, 1, 0, 0, 0])
    assert scored.rewards[0].components == {"right": 1.0}
    assert {r.status for r in scored.rewards} == {"ok"}


async def test_score_is_the_weighted_sum_of_the_functions_for_the_task(group, start_worker, user_config):
    config = user_config("length", "components", "any_arguments", options={"scale": 10})
    length, components, other = config.functions
    functions = (
        length.model_copy(update={"weight": 0.5, "options": {}}),
        components.model_copy(update={"weight": -1.0, "tasks": ("sums",)}),
        other.model_copy(update={"tasks": ("other",)}),
    )
    worker = await start_worker(config.model_copy(update={"functions": functions}))
    sums, others = await asyncio.gather(worker.score(group("abcd")), worker.score(group("abcd", task="other")))
    assert sums.rewards[0].components == {"length": 4.0, "components": 40.0, "components/format": 0.5}
    assert sums.rewards[0].score == 0.5 * 4 - 40
    # prompt, response, ... sample: nine arguments that every sample has, and the option
    assert others.rewards[0].components == {"length": 4.0, "any_arguments": 10.0}


async def test_functions_get_what_they_ask_for(group, start_worker, user_config):
    worker = await start_worker(user_config("everything", "async_length", "callable_object"))
    (reward,) = (await worker.score(group("3"))).rewards
    assert reward.components == {"everything": 1.0, "async_length": 1.0, "callable_object": 1.0}


@pytest.mark.slow  # it waits for a limit
@pytest.mark.parametrize("function", ["hang_on_x", "hang_in_c_on_x"])
async def test_a_hanging_function_costs_one_rollout_and_its_process(function, group, start_worker, user_config):
    worker = await start_worker(user_config(function, "async_length", timeout_s=1))
    first = worker.pid
    scored, other = await asyncio.gather(worker.score(group("a", "x", "b")), worker.score(group("c", row=1)))
    assert [r.status for r in scored.rewards] == ["ok", "timeout", "ok"]
    assert np.isnan(scored.rewards[1].score)
    assert f"{function}: took more than 1 s" in scored.rewards[1].detail
    assert scored.rewards[1].components == {"async_length": 1.0}
    assert other.rewards[0].status == "ok"
    assert worker.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.slow  # it waits for a limit
async def test_an_async_function_that_never_returns_is_cancelled(group, start_worker, user_config):
    worker = await start_worker(user_config("never_on_x", timeout_s=1))
    first = worker.pid
    scored = await worker.score(group("a", "x"))
    assert [r.status for r in scored.rewards] == ["ok", "timeout"]
    assert "never_on_x: took more than 1 s" in scored.rewards[1].detail
    assert worker.pid == first  # nothing needed killing


@pytest.mark.slow  # it waits for a limit
async def test_an_async_function_that_blocks_the_event_loop_costs_one_rollout(group, start_worker, user_config):
    worker = await start_worker(user_config("block_on_x", timeout_s=0.5))
    scored = await worker.score(group("a", "x", "b", "c"))
    assert [r.status for r in scored.rewards] == ["ok", "timeout", "ok", "ok"]


async def test_async_calls_run_at_once_up_to_the_limit(group, start_worker, user_config):
    # Five calls meet at a barrier: with five at once all pass, with four at once none can.
    five = await start_worker(user_config("five_at_once", concurrency=5, timeout_s=20))
    assert (await five.score(group(*"abcdefghij"))).scores.sum() == 10
    four = await start_worker(user_config("five_at_once", concurrency=4, timeout_s=0.5))
    assert {r.status for r in (await four.score(group(*"abcd"))).rewards} == {"timeout"}


@pytest.mark.parametrize(
    ("function", "said"),
    [("die_on_x", "its process died twice (exit code 3)"), ("crash_on_x", "its process died twice (signal SIGSEGV)")],
)
async def test_a_function_that_ends_its_process_costs_one_rollout(function, said, group, start_worker, user_config):
    worker = await start_worker(user_config(function, "async_length"))
    scored = await worker.score(group("a", "x", "b"))
    assert [r.status for r in scored.rewards] == ["ok", "error", "ok"]
    assert scored.rewards[1].detail == f"{function}: {said}"


async def test_a_process_killed_from_outside_costs_nothing(group, start_worker, user_config, tmp_path):
    worker = await start_worker(user_config("killed_once", options={"marker": str(tmp_path / "marker")}))
    scored = await worker.score(group("a", "b", "c"))
    assert (tmp_path / "marker").exists()
    np.testing.assert_array_equal(scored.scores, [1, 1, 1])


async def test_an_idle_process_that_was_killed_is_replaced(group, start_worker, wait_until_gone):
    worker = await start_worker(SUMS)
    first = worker.pid
    os.kill(first, signal.SIGKILL)
    assert wait_until_gone(first, 10)
    assert (await worker.score(group("3"))).rewards[0].score == 1
    assert worker.pid not in (None, first)


async def test_what_a_function_raises_or_returns_instead_of_a_number_is_recorded(group, start_worker, user_config):
    expected = {
        "raises": "ValueError: no such thing (",
        "raises_async": "KeyError: 'gone' (",
        "exits": "SystemExit: 4 (",
        "returns_text": "ValueError: returned '1.0', a str, not a number",
        "returns_none": "ValueError: returned None, a NoneType, not a number",
        "returns_nan": "ValueError: returned nan, not a finite number",
        "returns_infinity": "ValueError: returned inf as 'part', not a finite number",
        "returns_no_score": "ValueError: returned a dict without 'score' (it has 'reward')",
        "returns_array": "ValueError: returned array([0., 0., 0.]), a ndarray, not a number",
    }
    worker = await start_worker(user_config("length", *expected))
    (reward,) = (await worker.score(group("abc"))).rewards
    assert reward.status == "error"
    assert np.isnan(reward.score)
    assert reward.components == {"length": 3.0}
    details = dict(part.split(": ", 1) for part in reward.detail.split("; "))
    assert details.keys() == expected.keys()
    for name, start in expected.items():
        assert details[name].startswith(start)
    assert "user_functions.py:" in details["raises"]


def ranged(config, low, high, **settings):
    (function,) = config.functions
    return config.model_copy(update={"functions": (function.model_copy(update={"range": (low, high)}),), **settings})


async def test_a_score_outside_of_its_declared_range_is_none(group, start_worker, user_config):
    worker = await start_worker(ranged(user_config("as_number"), -0.5, 0.9))
    # 0.9 + 1e-12 is 0.9 in float32, which scores travel as
    scored = await worker.score(group("0.5", "0.9", "0.91", "-0.5", "-7", "0.900000000001"))
    assert [r.status for r in scored.rewards] == ["ok", "ok", "error", "ok", "error", "ok"]
    np.testing.assert_array_equal(scored.scores, np.array([0.5, 0.9, np.nan, -0.5, np.nan, 0.9], np.float32))
    assert scored.rewards[2].detail == "as_number: returned 0.91, outside of its range [-0.5, 0.9]"
    assert scored.rewards[2].components == {}
    assert scored.rewards[0].components == {"as_number": 0.5, "as_number/half": 0.25}
    worker = await start_worker(ranged(user_config("as_number"), 0.0, 1.0, on_failure="stop"))
    with pytest.raises(
        RewardError, match=r"sums/0@0#1 failed \(error\): as_number: returned 1.5, outside of its range"
    ):
        await worker.score(group("1", "1.5"))


async def test_what_float32_cannot_hold_is_no_score(group, start_worker, user_config):
    worker = await start_worker(user_config("as_number"))
    scored = await worker.score(group("3e38", "1e39"))
    assert [r.status for r in scored.rewards] == ["ok", "error"]
    assert scored.rewards[1].detail.startswith("as_number: ValueError: returned 1e+39 as 'score', which float32 cannot")
    config = user_config("as_number", "length")
    heavy = tuple(function.model_copy(update={"weight": 3.0}) for function in config.functions)
    worker = await start_worker(config.model_copy(update={"functions": heavy}))
    (reward,) = (await worker.score(group("3e38"))).rewards
    assert (reward.status, reward.detail) == (
        "error",
        "the weighted sum of the functions is 9e+38, which float32 cannot hold",
    )


async def test_on_failure_stop_raises(group, start_worker, user_config):
    worker = await start_worker(user_config("raises", on_failure="stop"))
    with pytest.raises(RewardError, match=r"sums/0@0#0 failed \(error\): raises: ValueError: no such thing"):
        await worker.score(group("a"))


async def test_a_task_without_a_function_is_an_error(group, start_worker):
    functions = [{"name": "right", "kind": "sums", "tasks": ["sums"]}]
    worker = await start_worker(RewardsConfig.model_validate({"functions": functions}))
    with pytest.raises(ConfigError, match="none applies to the task 'gsm8k'"):
        await worker.score(group("a", task="gsm8k"))


@pytest.mark.slow  # it waits for a limit
async def test_a_caller_that_gives_up_leaves_the_worker_in_order(group, start_worker, user_config, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    worker = await start_worker(user_config("tell_and_hang_on_x", timeout_s=1, options={"pipe": str(pipe)}))
    hopeless = asyncio.create_task(worker.score(group(*"xxxxxxxx")))
    assert await asyncio.to_thread(pipe.read_text) == "here I hang"
    hopeless.cancel()
    # The other seven calls would wait for someone to read their words, and hang as well.
    scored = await worker.score(group("a", row=1))
    assert scored.rewards[0].status == "ok"
    assert hopeless.cancelled()


@pytest.mark.slow  # it waits for a limit
async def test_what_a_killed_function_started_is_ended_too(group, start_worker, user_config, tmp_path, wait_until_gone):
    marker = tmp_path / "marker"
    worker = await start_worker(user_config("leave_a_process", timeout_s=1, options={"marker": str(marker)}))
    assert (await worker.score(group("a"))).rewards[0].status == "timeout"
    assert wait_until_gone(int(marker.read_text()), 10)


async def test_close_leaves_no_process(group, start_worker, wait_until_gone):
    worker = await start_worker(SUMS)
    child = worker.pid
    await worker.close()
    assert wait_until_gone(child, 10)
    await worker.close()  # closing twice does no harm
    with pytest.raises(RuntimeError, match="closed"):
        await worker.score(group("a"))


async def test_close_while_scoring_ends_the_wait(group, start_worker, user_config):
    worker = await start_worker(user_config("hang_on_x", timeout_s=100))
    waiting = asyncio.create_task(worker.score(group("x")))
    await asyncio.sleep(0)
    await worker.close()
    with pytest.raises(RuntimeError, match="closed"):
        await waiting


@pytest.mark.parametrize("state", ["idle", "lock"])
def test_the_process_does_not_outlive_a_killed_parent(state, wait_until_gone):
    """Idle, and in a function that lets no thread of its process run."""
    program = Path(__file__).with_name("parent_program.py")
    with subprocess.Popen([sys.executable, str(program), state], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    assert wait_until_gone(child, 10)


async def test_a_worker_must_be_started(group):
    with pytest.raises(RuntimeError, match="was not started"):
        await RewardWorker(SUMS).score(group("a"))


async def test_many_groups_at_once(group, start_worker):
    """More calls than are sent ahead."""
    worker = await start_worker(SUMS)
    groups = [group(*(str(i) for i in range(8)), answer=str(g % 8), row=g) for g in range(128)]
    scored = await asyncio.gather(*(worker.score(g) for g in groups))
    for g, result in enumerate(scored):
        assert result.group is groups[g]
        np.testing.assert_array_equal(result.scores, np.eye(8)[g % 8])
