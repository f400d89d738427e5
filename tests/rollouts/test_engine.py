"""The vLLM generator against `transformers` with the same weights.

Two engines, each started once: `engine` recomputes the cache of running requests at an update, `keeping` keeps it.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio

from rlsys.boundary import check_sampled
from rlsys.errors import ConfigError, DataError, EngineError, ModelMismatchError, WeightUpdateError, WorkerDied
from rlsys.roles import Probe, PublishedWeights, Sampling
from rlsys.rollouts.engine import VllmGenerator
from rlsys.rollouts.settings import engine_args
from rlsys.segments import Strategy
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.chain import Chain
from rlsys.segments.strategies.tree import Tree
from rlsys.types import Prompt, Reward, RolloutGroup, ScoredGroup
from rlsys.weights.vllm_plugin import BACKEND

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

END = 1
TOLERANCE = 1e-4
SHORT = Sampling(n=3, max_new_tokens=24)
# With two threads, rounding depends on what else is in a batch; with one it does not, and less could go wrong.
ROLLOUT = {"engine": {"kv_cache_gib": 0.05, "max_num_seqs": 64, "threads": 2}}
LONG = Sampling(n=2, max_new_tokens=240, ignore_eos=True)


class Setting:
    """A generator, the trainer it follows, and what it sampled first of all."""

    def __init__(self, generator: VllmGenerator, trainer: Any) -> None:
        self.generator = generator
        self.trainer = trainer
        self.first: list[RolloutGroup] = []

    async def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        groups = list(await asyncio.gather(*await self.generator.generate(prompts, sampling)))
        for prompt, group in zip(prompts, groups, strict=True):
            check_sampled(group, prompt, sampling, self.generator.vocabulary)
            assert [rollout.sample for rollout in group.rollouts] == list(range(sampling.n))
            for rollout in group.rollouts:
                check_spans(rollout.version_spans, len(rollout.token_ids))
        return groups

    def worst(self, groups: Sequence[RolloutGroup], temperature: float = 1.0) -> float:
        return max(float(self.trainer.differences(group, temperature).max()) for group in groups)


def check_spans(spans: Sequence[Any], length: int) -> None:
    """Spans cover [0, length) without gaps, in rising order of version."""
    assert spans[0].start == 0
    assert spans[-1].end == length
    for before, after in itertools.pairwise(spans):
        assert before.end == after.start
        assert before.version < after.version
    assert all(span.start < span.end for span in spans)


async def start(config: Any, path: Path, trainer: Any, prompts: list[Prompt]) -> Setting:
    setting = Setting(VllmGenerator("generator-0", config, path), trainer)
    await setting.generator.start()
    # More requests than run at once, which end at different times: much for the schedule to depend on.
    setting.first = await setting.sample(prompts, Sampling(n=8, max_new_tokens=60))
    return setting


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    environment: None, tiny_model: Path, make_trainer: Any, make_config: Any, make_prompts: Any
) -> AsyncIterator[Setting]:
    config = make_config(tiny_model, rollout=ROLLOUT)
    setting = await start(config, tiny_model, make_trainer(tiny_model), make_prompts(24))
    yield setting
    await setting.generator.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keeping(
    environment: None, tiny_model: Path, make_trainer: Any, make_config: Any, make_prompts: Any
) -> AsyncIterator[Setting]:
    config = make_config(tiny_model, rollout=ROLLOUT, weights={"kv_cache": "keep"})
    setting = await start(config, tiny_model, make_trainer(tiny_model), make_prompts(24))
    yield setting
    await setting.generator.close()


async def test_two_fresh_engines_give_the_same_to_the_last_bit(engine: Setting, keeping: Setting) -> None:
    for a, b in zip(engine.first, keeping.first, strict=True):
        for x, y in zip(a.rollouts, b.rollouts, strict=True):
            assert x.token_ids.tobytes() == y.token_ids.tobytes()
            assert x.behavior_logprobs.tobytes() == y.behavior_logprobs.tobytes()
            assert x.text == y.text
    assert len({len(rollout.token_ids) for group in engine.first for rollout in group.rollouts}) > 10


async def test_nothing_of_a_call_is_sampled_before_all_of_it_is_submitted(
    engine: Setting, make_prompts: Callable[..., list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm: Any = engine.generator._engine
    add_request = vllm.add_request
    sampled = []

    async def slow(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(0.05)  # enough for several tokens
        sampled.append(await engine.generator.progress())
        return await add_request(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(vllm, "add_request", slow)
        groups = await engine.sample(make_prompts(4), SHORT)
    assert len(groups) == len(sampled) == 4
    assert len(set(sampled)) == 1


async def test_the_first_weights_that_fail_the_probe_tell_of_two_implementations(
    engine: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = engine.trainer.publish()
    logprobs = list(weights.probe.logprobs)
    logprobs[20] -= 0.021
    wrong = replace(weights, probe=replace(weights.probe, logprobs=tuple(logprobs)))
    ended: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(engine.generator, "_end", ended.append)  # the tests below need the engine
        with pytest.raises(ModelMismatchError) as caught:
            await engine.generator.update(wrong)
    said = str(caught.value)
    assert ended == [said]
    assert said.startswith(f"generator-0: version {weights.version} arrived as it was sent (xxh3_64:")
    figures = re.search(
        r"by up to (\S+) \((\S+) on average; .* most at token 21 of 32, id 24: (\S+) at .*, (\S+) here", said
    )
    assert figures is not None
    wanted = [0.021, 0.021 / 31, logprobs[20], weights.probe.logprobs[20]]
    assert [float(figure) for figure in figures.groups()] == pytest.approx(wanted, abs=TOLERANCE)
    assert "Qwen3ForCausalLM" in said
    await engine.generator.update(weights)


async def test_logprobs_are_those_of_transformers_at_start_and_after_every_update(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    prompts = make_prompts(4, seed=1)
    groups = await engine.sample(prompts, SHORT)
    assert engine.worst(groups) <= TOLERANCE
    for _ in range(4):
        before = engine.trainer.version
        weights = engine.trainer.publish()
        report = await engine.generator.update(weights)
        assert (report.version, report.bytes) == (weights.version, weights.payload.nbytes)
        assert report.probe_difference <= TOLERANCE
        groups = await engine.sample(prompts, SHORT)
        assert {span.version for group in groups for r in group.rollouts for span in r.version_spans} == {
            weights.version
        }
        assert engine.worst(groups) <= TOLERANCE
        # The test can fail: the version before would have said something else.
        rollout = groups[0].rollouts[0]
        old = engine.trainer.of_response(before, groups[0].prompt, rollout)
        assert np.abs(old - rollout.behavior_logprobs).max() > 100 * TOLERANCE


async def updated_in_flight(setting: Setting, prompts: list[Prompt], pacers: list[Prompt]) -> list[RolloutGroup]:
    """Long rollouts, with three updates while they run and some tokens in between."""
    versions = [setting.trainer.publish() for _ in pacers]
    running = await setting.generator.generate(prompts, LONG)
    for pacer, weights in zip(pacers, versions, strict=True):
        await setting.sample([pacer], Sampling(n=1, max_new_tokens=15, ignore_eos=True))
        await setting.generator.update(weights)
    groups = list(await asyncio.gather(*running))
    for group in groups:
        for rollout in group.rollouts:
            check_spans(rollout.version_spans, LONG.max_new_tokens)
            assert len(rollout.version_spans) == len(pacers) + 1
    return groups


async def test_every_token_has_the_logprob_of_its_version_when_the_cache_is_recomputed(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    groups = await updated_in_flight(engine, make_prompts(6, seed=2), make_prompts(3, seed=3))
    assert engine.worst(groups) <= TOLERANCE


async def test_with_the_cache_kept_only_the_first_version_is_exact(
    keeping: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    groups = await updated_in_flight(keeping, make_prompts(6, seed=2), make_prompts(3, seed=3))
    first, later = [], []
    for group in groups:
        differences = keeping.trainer.differences(group).reshape(LONG.n, LONG.max_new_tokens)
        for rollout, row in zip(group.rollouts, differences, strict=True):
            end = rollout.version_spans[0].end
            first.append(row[:end])
            later.append(row[end:])
    later_difference = np.concatenate(later)
    assert np.concatenate(first).max() <= TOLERANCE
    assert np.isfinite(later_difference).all()
    assert later_difference.max() > 10 * TOLERANCE


async def test_a_new_request_never_sees_cached_states_of_old_weights(
    engine: Setting, keeping: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    prompts = make_prompts(2, length=200, seed=4)  # more than one block of the cache
    for setting in (engine, keeping):
        versions = [setting.trainer.publish() for _ in range(2)]
        # Something that runs all the time, for an idle engine starts with an empty cache in any case.
        (running,) = await setting.generator.generate(make_prompts(1, seed=5), LONG)
        groups = await setting.sample(prompts, Sampling(n=2, max_new_tokens=4))
        for weights in versions:
            await setting.generator.update(weights)
            groups += await setting.sample(prompts, Sampling(n=2, max_new_tokens=4))
        assert not running.done()
        assert setting.worst(groups) <= TOLERANCE
        await running


async def test_a_shared_cache_says_how_much_of_a_prompt_older_weights_have_read(
    keeping: Setting, make_prompts: Callable[..., list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = keeping  # one engine less to start
    monkeypatch.setattr(sharing.generator, "_shared", True)
    prompts = make_prompts(2, length=200, seed=4)
    (running,) = await sharing.generator.generate(make_prompts(1, seed=5), LONG)
    before = await sharing.sample(prompts, Sampling(n=2, max_new_tokens=4))
    await sharing.generator.update(sharing.trainer.publish())
    after = await sharing.sample(prompts, Sampling(n=2, max_new_tokens=4))
    fresh = await sharing.sample(make_prompts(2, length=200, seed=14), Sampling(n=2, max_new_tokens=4))
    assert not running.done()
    assert [group.old_states for group in before] == [0, 0]
    assert all(100 < group.old_states < 200 for group in after)
    assert [group.old_states for group in fresh] == [0, 0]
    assert sharing.worst(before) <= TOLERANCE
    assert sharing.worst(fresh) <= TOLERANCE
    assert sharing.worst(after) > 10 * TOLERANCE
    await running


@pytest.mark.parametrize("made", [Chain(continuations=2), Tree(breadth=(2, 2, 2), segment_tokens=60)])
async def test_every_token_of_chains_and_trees_has_the_logprob_of_its_version(
    engine: Setting, make_prompts: Callable[..., list[Prompt]], made: Strategy
) -> None:
    """With an update in the middle of every round: what is joined is of up to four versions."""
    made.bind(FixedLength(tokens=45), 180)
    (prompt,), sampling = make_prompts(1, seed=6), Sampling(n=2, max_new_tokens=180, ignore_eos=True)
    wanted, rounds = [(prompt, made.first(sampling))], []
    while wanted:
        weights = engine.trainer.publish()
        running = [task for p, s in wanted for task in await engine.generator.generate([p], s)]
        await engine.sample(make_prompts(1, seed=7), Sampling(n=1, max_new_tokens=10, ignore_eos=True))
        await engine.generator.update(weights)
        rounds.append(list(await asyncio.gather(*running)))
        wanted = [
            (branch.prompt, replace(sampling, n=branch.n, max_new_tokens=branch.max_new_tokens))
            for branch in made.branch(rounds)
        ]
    scored = [ScoredGroup(group, (Reward("ok", 1.0),) * len(group.rollouts)) for group in made.to_score(rounds)]
    group = made.assemble(rounds, scored).group
    assert all(len(rollout.token_ids) == 180 for rollout in group.rollouts)
    assert max(len(rollout.version_spans) for rollout in group.rollouts) == (4 if isinstance(made, Tree) else 2)
    assert engine.worst([group, *itertools.chain(*rounds)]) <= TOLERANCE


async def test_seeds_reproduce_samples(engine: Setting, make_prompts: Callable[..., list[Prompt]]) -> None:
    (prompt,) = make_prompts(1, seed=6)
    (group,) = await engine.sample([prompt], Sampling(n=4, max_new_tokens=20))
    (again,) = await engine.sample([prompt], Sampling(n=4, max_new_tokens=20))
    (third,) = await engine.sample([replace(prompt, seed=prompt.seed + 3)], Sampling(n=1, max_new_tokens=20))
    (other,) = await engine.sample([replace(prompt, seed=prompt.seed + 50)], Sampling(n=4, max_new_tokens=20))
    for x, y in zip(group.rollouts, again.rollouts, strict=True):
        assert np.array_equal(x.token_ids, y.token_ids)
    assert np.array_equal(group.rollouts[3].token_ids, third.rollouts[0].token_ids)
    assert len({rollout.token_ids.tobytes() for rollout in (*group.rollouts, *other.rollouts)}) == 8


async def test_the_end_of_a_rollout(engine: Setting, make_prompts: Callable[..., list[Prompt]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(engine.trainer.path)
    reasons = set()
    for group in await engine.sample(make_prompts(16, seed=7), Sampling(n=4, max_new_tokens=70)):
        for rollout in group.rollouts:
            reasons.add(rollout.finish_reason)
            ids = rollout.token_ids.tolist()
            assert rollout.action_mask.all()
            assert END not in ids[:-1]
            if rollout.finish_reason == "stop":
                assert ids.pop() == END
                assert rollout.status == "ok"
            else:
                assert len(ids) == 70
                assert rollout.status == "truncated"
            assert rollout.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert reasons == {"stop", "length"}


async def test_stop_strings(engine: Setting, make_prompts: Callable[..., list[Prompt]]) -> None:
    from transformers import AutoTokenizer

    letter = AutoTokenizer.from_pretrained(engine.trainer.path).convert_tokens_to_ids("e")
    sampling = Sampling(n=8, max_new_tokens=70, stop=("e",), ignore_eos=True)
    groups = await engine.sample(make_prompts(8, seed=8), sampling)
    stopped = [r for group in groups for r in group.rollouts if r.finish_reason == "stop"]
    assert len(stopped) > 5
    for rollout in stopped:
        assert rollout.token_ids[-1] == letter
        assert letter not in rollout.token_ids[:-1]
        assert "e" not in rollout.text
    assert engine.worst(groups) <= TOLERANCE


@pytest.mark.parametrize("temperature", [0.5, 1.7])
async def test_logprobs_are_at_the_sampling_temperature(
    engine: Setting, make_prompts: Callable[..., list[Prompt]], temperature: float
) -> None:
    groups = await engine.sample(make_prompts(4, seed=9), replace(SHORT, temperature=temperature))
    assert engine.worst(groups, temperature) <= TOLERANCE
    assert engine.worst(groups, 1.0) > 100 * TOLERANCE


async def test_greedy_sampling_takes_the_likeliest_token(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    # Together with a sampled one: vLLM has another code path for a batch that is greedy throughout.
    prompts = make_prompts(3, seed=10)
    others = await engine.generator.generate(prompts, LONG)
    groups = await engine.sample(prompts, Sampling(n=1, max_new_tokens=10, temperature=0.0, ignore_eos=True))
    groups += await asyncio.gather(*others) and await engine.sample(
        prompts, Sampling(n=1, max_new_tokens=10, temperature=0.0, ignore_eos=True)
    )
    for group in groups:
        ids = [*group.prompt.token_ids.tolist(), *group.rollouts[0].token_ids.tolist()]
        table = engine.trainer.logprobs(engine.trainer.version, ids)[len(group.prompt.token_ids) - 1 : -1]
        assert table.argmax(-1).tolist() == group.rollouts[0].token_ids.tolist()
    assert engine.worst(groups) <= TOLERANCE


async def test_logprobs_with_a_cut_distribution_are_renormalised(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    sampling = Sampling(n=2, max_new_tokens=20, temperature=0.8, top_k=5, ignore_eos=True)
    for group in await engine.sample(make_prompts(3, seed=11), sampling):
        for rollout in group.rollouts:
            ids = [*group.prompt.token_ids.tolist(), *rollout.token_ids.tolist()]
            table = engine.trainer.logprobs(engine.trainer.version, ids, 0.8)[len(group.prompt.token_ids) - 1 : -1]
            kept = table.topk(5)
            for t, token in enumerate(rollout.token_ids.tolist()):
                assert token in kept.indices[t].tolist()
                wanted = float(table[t, token] - kept.values[t].logsumexp(0))
                assert rollout.behavior_logprobs[t] == pytest.approx(wanted, abs=TOLERANCE)


async def test_progress_counts_tokens_of_running_requests(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    begin = await engine.generator.progress()
    running = await engine.generator.generate(make_prompts(4, seed=12), LONG)
    pacer = await engine.sample(make_prompts(1, seed=13), Sampling(n=1, max_new_tokens=10, ignore_eos=True))
    assert not any(task.done() for task in running)
    midway = await engine.generator.progress() - begin
    await asyncio.gather(*running)
    total = 4 * LONG.n * LONG.max_new_tokens + len(pacer[0].rollouts[0].token_ids)
    assert 10 * 4 * LONG.n < midway < total
    assert await engine.generator.progress() - begin == total


async def test_a_cancelled_prompt_is_sampled_no_longer(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    cancelled, kept = await engine.generator.generate(make_prompts(2, seed=14), LONG)
    before = await engine.generator.progress()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert len((await kept).rollouts) == LONG.n
    sampled = await engine.generator.progress() - before
    assert sampled < 1.5 * LONG.n * LONG.max_new_tokens


@pytest.mark.parametrize("length", [0, 256, 300])
async def test_a_prompt_without_room_is_named(
    engine: Setting, make_prompts: Callable[..., list[Prompt]], length: int
) -> None:
    prompt = replace(make_prompts(1)[0], token_ids=np.full(length, 5, dtype=np.int32))
    with pytest.raises(DataError, match=f"p/0 has {length} tokens"):
        await engine.generator.generate([prompt], SHORT)


async def test_a_request_that_vllm_refuses_takes_nothing_along(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    good, bad = make_prompts(2, seed=17)
    bad = replace(bad, token_ids=np.array([5, 5000], dtype=np.int32))
    before = await engine.generator.progress()
    with pytest.raises(EngineError, match=r"generator-0: vLLM refuses a request: .*5000"):
        await engine.generator.generate([good, bad], SHORT)
    (group,) = await engine.sample([good], SHORT)
    assert await engine.generator.progress() - before == sum(len(rollout.token_ids) for rollout in group.rollouts)


async def test_a_response_ends_at_the_length_of_the_model(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    (group,) = await engine.sample(make_prompts(1, length=250), Sampling(n=2, max_new_tokens=50, ignore_eos=True))
    assert [len(rollout.token_ids) for rollout in group.rollouts] == [6, 6]
    assert {rollout.status for rollout in group.rollouts} == {"truncated"}


def with_tensor(weights: PublishedWeights, **changes: Any) -> PublishedWeights:
    first, *rest = weights.manifest["tensors"]
    return replace(weights, manifest={**weights.manifest, "tensors": [{**first, **changes}, *rest]})


def damaged(weights: PublishedWeights) -> PublishedWeights:
    payload = weights.payload.copy()
    payload[1000] ^= 1
    return replace(weights, payload=payload)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "checksum"),
        (lambda weights: replace(weights, payload=weights.payload[:-64]), "bytes came"),
        (lambda weights: with_tensor(weights, shape=[64, 98]), "shape"),
        (lambda weights: with_tensor(weights, name="model.nothing"), "lack 1 tensors"),
        (lambda weights: replace(weights, version=weights.version + 1), "manifest of"),
        (lambda weights: replace(weights, probe=Probe((3,), ())), "no probe"),
    ],
)
async def test_wrong_weights_are_refused_and_the_old_ones_stay(
    engine: Setting,
    make_prompts: Callable[..., list[Prompt]],
    spoil: Callable[[PublishedWeights], PublishedWeights],
    message: str,
) -> None:
    old = engine.trainer.version
    weights = engine.trainer.publish()
    running = await engine.generator.generate(make_prompts(1, seed=15), replace(LONG, max_new_tokens=40))
    with pytest.raises(WeightUpdateError, match=message):
        await engine.generator.update(spoil(weights))
    groups = [*await engine.sample(make_prompts(2, seed=16), SHORT), *await asyncio.gather(*running)]
    assert {span.version for group in groups for r in group.rollouts for span in r.version_spans} == {old}
    assert engine.worst(groups) <= TOLERANCE
    await engine.generator.update(weights)


async def test_an_older_version_is_refused_and_the_same_one_is_taken_again(engine: Setting) -> None:
    weights = engine.trainer.publish()
    await engine.generator.update(weights)
    await engine.generator.update(weights)
    older = replace(weights, version=weights.version - 1, manifest={**weights.manifest, "version": weights.version - 1})
    with pytest.raises(WeightUpdateError, match="already"):
        await engine.generator.update(older)


async def test_extra_engine_arguments(make_config: Callable[..., Any], tiny_model: Path) -> None:
    def arguments(**extra: Any) -> Any:
        return engine_args(make_config(tiny_model, rollout={"engine": {"extra": extra}}), tiny_model)

    assert arguments(block_size=64).block_size == 64
    with pytest.raises(ConfigError, match=r"rollout.engine.extra.blok_size: .*did you mean 'block_size'"):
        arguments(blok_size=64)
    with pytest.raises(ConfigError, match=r"rollout.engine.extra.logprobs_mode: .*set by rlsys"):
        arguments(logprobs_mode="raw_logprobs")


async def test_the_weight_engine_is_selected_by_profile(make_config: Callable[..., Any], tiny_model: Path) -> None:
    def arguments(profile: str, engine: str) -> Any:
        return engine_args(make_config(tiny_model, profile=profile, weights={"engine": engine}), tiny_model)

    assert arguments("gpu", "nccl").weight_transfer_config.backend == "nccl"
    assert arguments("gpu", "object_store").weight_transfer_config.backend == BACKEND
    assert arguments("cpu", "object_store").weight_transfer_config.backend == BACKEND
    with pytest.raises(ConfigError, match=r"weights.engine: nccl needs profile: gpu"):
        arguments("cpu", "nccl")


async def test_an_engine_that_does_not_start_names_itself(make_config: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"generator-9: vLLM does not start with .*empty"):
        await VllmGenerator("generator-9", make_config(tmp_path), tmp_path / "empty").start()


async def test_it_must_be_started_first(make_config: Callable[..., Any], tiny_model: Path) -> None:
    with pytest.raises(EngineError, match="not been started"):
        await VllmGenerator("generator-9", make_config(tiny_model), tiny_model).progress()


# These two end an engine, so they come last.


async def test_weights_that_fail_the_probe_end_the_engine(
    keeping: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    weights = keeping.trainer.publish()
    wrong = replace(weights, probe=replace(weights.probe, logprobs=tuple(x + 0.01 for x in weights.probe.logprobs)))
    (running,) = await keeping.generator.generate(make_prompts(1), LONG)
    with pytest.raises(WeightUpdateError, match=r"generator-0: .*differ from the learner's by up to 1.00e-02"):
        await keeping.generator.update(wrong)
    with pytest.raises(WorkerDied, match=r"generator-0 died"):
        await running
    with pytest.raises(WorkerDied, match=r"generator-0 died"):
        await keeping.generator.update(weights)


async def test_the_death_of_an_idle_engine_is_reported(
    engine: Setting, make_prompts: Callable[..., list[Prompt]]
) -> None:
    """vLLM tells those who wait for tokens; a sign of life tells of it where nobody does."""
    # vLLM renames its process; Linux keeps 15 characters of the name.
    (core,) = [p for p in psutil.Process().children(recursive=True) if "EngineCor" in p.name()]
    core.kill()

    async def signs() -> None:
        while True:
            await engine.generator.progress()
            await asyncio.sleep(0.05)

    with pytest.raises(WorkerDied, match="generator-0 died: its vLLM engine process ended"):
        await asyncio.wait_for(signs(), 30)
    with pytest.raises(WorkerDied, match="generator-0 died"):
        await engine.generator.generate(make_prompts(1), LONG)
