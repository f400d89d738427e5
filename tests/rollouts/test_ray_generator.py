"""Generators as Ray actors: what the driver sees of them, and what is left when one is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from rlsys.actors.generator import RayGenerator, start_generator
from rlsys.errors import BadRollout, EngineError, ModelMismatchError, RolloutError, WeightUpdateError, WorkerDied
from rlsys.roles import Probe, PublishedWeights, Sampling
from rlsys.rollouts.fake import TENSOR, VOCABULARY, FakeGenerator
from rlsys.types import Prompt, RolloutGroup, group_info
from rlsys.weights.publish import pack

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

NOWHERE = Path("nowhere")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
async def fake(make_config: Any) -> Any:
    generator = await start_generator("generator-0", make_config(NOWHERE), NOWHERE, factory=FakeGenerator)
    yield generator
    await generator.close()


def published(version: int) -> PublishedWeights:
    """Weights of the fake, with the payload in the object store, as the learner publishes them."""
    logits = torch.arange(VOCABULARY, dtype=torch.float32) / 10
    payload, manifest = pack([(TENSOR, logits)], version)
    probe = Probe((0, 5), (float(logits.log_softmax(0)[5]),))
    return PublishedWeights(version, manifest, ray.put(payload), probe)


async def pid_of(generator: RayGenerator) -> int:
    return int(await generator.actor.__ray_call__.remote(lambda _: os.getpid()))


async def test_groups_come_as_metadata_and_a_reference(fake: RayGenerator, make_prompts: Any) -> None:
    prompts = make_prompts(5)
    answers = await fake.generate(prompts, Sampling(n=3, max_new_tokens=20))
    assert len(answers) == 5
    for prompt, answer in zip(prompts, answers, strict=True):
        generated = await answer
        assert isinstance(generated.payload, ray.ObjectRef)
        group = await generated.payload
        assert generated.info == group_info(group)
        assert (generated.info.prompt_id, generated.info.generator) == (prompt.id, "generator-0")
        assert len(group.rollouts) == 3
    assert await fake.progress() > 0


async def test_an_update_comes_by_reference(fake: RayGenerator, make_prompts: Any) -> None:
    assert (await fake.update(published(4))).version == 4
    (answer,) = await fake.generate(make_prompts(1), Sampling(n=1, max_new_tokens=5))
    assert (await answer).info.min_version == 4
    with pytest.raises(WeightUpdateError, match="cannot take 3"):
        await fake.update(published(3))


async def test_finished_groups_outlive_their_generator(make_config: Any, make_prompts: Any) -> None:
    generator = await start_generator("generator-1", make_config(NOWHERE), NOWHERE, factory=FakeGenerator)
    # One group small enough for Ray to send it along, one for which it uses shared memory.
    small, large = [
        await (await generator.generate(make_prompts(1), Sampling(n=n, max_new_tokens=100, ignore_eos=True)))[0]
        for n in (1, 200)
    ]
    (unfinished,) = await generator.generate(make_prompts(1), Sampling(n=1, max_new_tokens=10**9, ignore_eos=True))
    os.kill(await pid_of(generator), signal.SIGKILL)
    with pytest.raises(WorkerDied, match="generator-1 died") as caught:
        await unfinished
    assert caught.value.worker == "generator-1"
    for generated, n in ((small, 1), (large, 200)):
        assert sum(len(r.token_ids) for r in (await generated.payload).rollouts) == n * 100
    for call in (
        generator.progress(),
        generator.update(published(1)),
        generator.generate(make_prompts(1), Sampling(1, 1)),
    ):
        with pytest.raises(WorkerDied, match="generator-1 died"):
            await call
    await generator.close()


async def test_what_an_engine_cannot_have_sampled_is_refused_and_the_rest_goes_on(
    make_config: Any, make_prompts: Any
) -> None:
    class Liar(FakeGenerator):
        """Its log-probs of one prompt are those of an odd kernel; another it answers with too few samples."""

        async def _sample_group(self, prompt: Prompt, sampling: Sampling) -> RolloutGroup:
            group = await super()._sample_group(prompt, sampling)
            first, *rest = group.rollouts
            if prompt.id == "p/1":
                first = replace(first, behavior_logprobs=first.behavior_logprobs * np.float32("nan"))
            return replace(group, rollouts=(first, *rest) if prompt.id != "p/2" else (first,))

    sampling = Sampling(n=3, max_new_tokens=20)
    for on_refused, wanted in (("retry", BadRollout), ("stop", RolloutError)):
        config = make_config(NOWHERE, rollout={"on_refused": on_refused})
        generator = await start_generator("generator-6", config, NOWHERE, factory=Liar)
        answers = await generator.generate(make_prompts(3), sampling)
        assert (await answers[0]).info.prompt_id == "p/0"
        with pytest.raises(wanted, match=r"generator-6: prompt p/1, sample 0: the log-prob of .* nan") as logprobs:
            await answers[1]
        with pytest.raises(wanted, match="generator-6: prompt p/2, sample 1: it is missing, 3 were") as count:
            await answers[2]
        assert [e.value.kind for e in (logprobs, count)] == ["log-probs", "count"]
        (again,) = await generator.generate(make_prompts(1), sampling)
        assert len((await (await again).payload).rollouts) == 3
        await generator.close()


async def test_two_implementations_that_differ_are_told_of_through_ray(fake: RayGenerator) -> None:
    weights = published(1)
    with pytest.raises(ModelMismatchError, match="generator-0: version 1 arrived as it was sent") as caught:
        await fake.update(replace(weights, probe=Probe((0, 5), (-9.0,))))
    assert caught.value.kind == "probe"


async def test_a_cancelled_awaitable_ends_the_sampling(make_config: Any, make_prompts: Any) -> None:
    class Watched(FakeGenerator):
        async def start(self) -> None:
            self.ended = asyncio.Event()
            await super().start()

        async def _sample_group(self, prompt: Prompt, sampling: Sampling) -> RolloutGroup:
            try:
                return await super()._sample_group(prompt, sampling)
            except asyncio.CancelledError:
                self.ended.set()
                raise

        async def progress(self) -> int:
            await self.ended.wait()
            return self._tokens

    generator = await start_generator("generator-0", make_config(NOWHERE), NOWHERE, factory=Watched)
    (endless,) = await generator.generate(make_prompts(1), Sampling(n=1, max_new_tokens=10**9, ignore_eos=True))
    endless.cancel()
    with pytest.raises(asyncio.CancelledError):
        await endless
    async with asyncio.timeout(30):
        assert await generator.progress() > 0
    await generator.close()


async def test_a_generator_that_does_not_start_is_given_up(make_config: Any) -> None:
    class Stuck(FakeGenerator):
        async def start(self) -> None:
            await asyncio.Event().wait()

    config = make_config(NOWHERE, rollout={"start_timeout_s": 5.0})
    with pytest.raises(EngineError, match=r"generator-2 was not ready within rollout.start_timeout_s=5 s"):
        await start_generator("generator-2", config, NOWHERE, factory=Stuck)


async def test_an_engine_that_cannot_be_built_says_why(make_config: Any) -> None:
    class Broken(FakeGenerator):
        async def start(self) -> None:
            raise RuntimeError("no such device")

    with pytest.raises(EngineError, match="generator-3: RuntimeError: no such device"):
        await start_generator("generator-3", make_config(NOWHERE), NOWHERE, factory=Broken)


async def test_vllm_in_an_actor_takes_weights_and_leaves_nothing_behind_when_killed(
    untied_model: Path, make_trainer: Any, make_config: Any, make_prompts: Callable[..., list[Prompt]]
) -> None:
    trainer = make_trainer(untied_model)
    generator = await start_generator("generator-4", make_config(untied_model), untied_model, version=7)
    prompts = make_prompts(4)

    async def sample(version: int) -> None:
        for answer in await generator.generate(prompts, Sampling(n=4, max_new_tokens=30)):
            generated = await answer
            assert (generated.info.min_version, generated.info.max_version) == (version, version)
            assert trainer.differences(await generated.payload).max() <= 1e-4

    trainer.relabel(7)
    await sample(7)
    for _ in range(2):
        weights = trainer.publish()
        by_reference = PublishedWeights(weights.version, weights.manifest, ray.put(weights.payload), weights.probe)
        report = await generator.update(by_reference)
        assert report.probe_difference <= 1e-4
        await sample(weights.version)

    (running,) = await generator.generate(prompts[:1], Sampling(n=2, max_new_tokens=200, ignore_eos=True))
    actor = psutil.Process(await pid_of(generator))
    children = actor.children(recursive=True)
    assert any(child.memory_info().rss > 2**29 for child in children), "the engine is a process of its own"
    actor.kill()
    with pytest.raises(WorkerDied, match="generator-4 died"):
        await running
    _, alive = psutil.wait_procs([actor, *children], timeout=20)
    assert alive == []


def until_stopped(process: psutil.Process) -> None:
    """A signal takes its time. Nothing tells of it to whoever is not the parent."""
    deadline = time.monotonic() + 30
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline


async def test_a_stopped_engine_is_named_and_ended(tiny_model: Path, make_config: Any) -> None:
    generator = await start_generator("generator-5", make_config(tiny_model), tiny_model)
    [report] = await generator.inspect()
    actor = psutil.Process(report.pid)
    family = [actor, *actor.children(recursive=True)]
    [engine] = [process for process in family if process.cmdline()[0] == "VLLM::EngineCore"]
    engine.suspend()
    until_stopped(engine)
    [report] = await generator.inspect()
    assert f"ray::GeneratorActor (process {actor.pid}, sleeping)" in report.stacks
    assert f"VLLM::EngineCore (process {engine.pid}, stopped)" in report.stacks
    assert "run_busy_loop" in report.stacks
    actor.suspend()
    await generator.close()
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


async def test_an_engine_that_dies_while_it_starts_has_its_last_words_told(
    tiny_model: Path, tmp_path: Path, make_config: Any
) -> None:
    """Heads of 16, for which vLLM has no attention on the CPU: its process says so, and dies at the first token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

    config = Phi3Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(WorkerDied, match="generator-6 died: its vLLM engine process ended") as caught:
        await start_generator("generator-6", make_config(tmp_path), tmp_path)
    _, mark, said = str(caught.value).partition("\ngenerator-6's last output:\n")
    assert mark
    assert "head_dim=16" in said
