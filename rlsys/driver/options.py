"""What the parts of the driver take from the config."""

from __future__ import annotations

from rlsys.config.models import Config
from rlsys.driver.waiting import STORE_TIMEOUT_S
from rlsys.driver.workers import PoolOptions, WorkerEvents
from rlsys.roles import Sampling
from rlsys.segments import Strategy

REWARD_MARGIN_S = 30.0  # on top of the reward workers' own time limits


def training_sampling(config: Config, greedy: bool = False, expert: bool = False) -> Sampling:
    rollout = config.rollout
    return Sampling(
        n=rollout.samples_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
        ignore_eos=rollout.ignore_eos,
        greedy=greedy,
        expert=expert,
    )


def evaluation_sampling(config: Config) -> Sampling:
    return Sampling(
        n=config.eval.samples_per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.eval.temperature,
        stop=config.rollout.stop,
        ignore_eos=config.rollout.ignore_eos,
    )


def generator_options(config: Config, events: WorkerEvents) -> PoolOptions:
    rollout = config.rollout
    # Twice what an engine runs at once keeps it busy and leaves the rest for whoever is free first. With a bound of 0 a
    # batch is handed over whole.
    at_once = max(1, rollout.engine.max_num_seqs // max(1, rollout.samples_per_prompt))
    return PoolOptions(
        kind="generator",
        patience=rollout.stall_timeout_s,
        silence=config.driver.silence_timeout_s,
        start_timeout_s=rollout.start_timeout_s + config.resources.placement_timeout_s,  # first it may wait for a node
        attempts=rollout.attempts,
        capacity=None if config.driver.max_staleness == 0 else 2 * at_once,
        whole=config.driver.max_staleness == 0,
        events=events,
    )


def rewarder_options(config: Config, events: WorkerEvents, strategy: Strategy | None = None) -> PoolOptions:
    rewards, samples = config.rewards, config.rollout.samples_per_prompt
    if strategy is not None and strategy.branches:
        samples = max(samples, round(strategy.expected_tokens(samples) / config.rollout.max_new_tokens))
    # A worker may call every function on every rollout of a group one after the other.
    calls = (samples + 2) * len(rewards.functions)
    return PoolOptions(
        kind="rewarder",
        patience=calls * rewards.timeout_s + REWARD_MARGIN_S,
        silence=config.driver.silence_timeout_s,
        start_timeout_s=rewards.start_timeout_s + config.resources.placement_timeout_s,
        attempts=config.rollout.attempts,
        events=events,
    )


def patience(config: Config) -> float:
    """Seconds: longer than everything that may happen in a row without a change of the driver's state."""
    updates = config.weights.timeout_s * (config.rollout.generators + 1)
    starts = 2 * max(config.rollout.start_timeout_s, config.rewards.start_timeout_s) + config.rollout.stall_timeout_s
    return 3 * config.learner.step_timeout_s + config.eval.timeout_s + updates + starts + STORE_TIMEOUT_S
