"""The learner group over Ray: two ranks with a critic, from scored groups to published weights."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rlsys.actors.learner import start_learner
from rlsys.config.models import Config
from rlsys.errors import DataError, LearnerError, NonFiniteError, WeightUpdateError, WorkerDied
from rlsys.roles import TrainItem
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, VersionSpan, group_info

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


def config(**changes: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"train": {"kind": "sums"}},
            "rewards": {"functions": [{"name": "sums", "kind": "sums"}]},
            "algorithm": {"preset": "ppo", "epochs": 2, "minibatches": 2, "regularize": [{"name": "kl"}]},
            "learner": {
                "ranks": 2,
                "zero_stage": 2,
                "threads": 1,
                "micro_batch_tokens": 64,
                "optimizer": {"learning_rate": 1e-3},
            },
        }
        | changes
    )


def group(index: int, seed: int, behavior: float = -4.6) -> ScoredGroup:
    rng = np.random.default_rng(seed)
    prompt = Prompt(f"sums/{index}@0", index, rng.integers(2, 90, 5).astype(np.int32), "?", "sums", "1", seed)
    rollouts, rewards = [], []
    for sample in range(4):
        length = int(rng.integers(2, 12))
        rollouts.append(
            Rollout(
                prompt.id,
                sample,
                rng.integers(2, 90, length).astype(np.int32),
                np.ones(length, dtype=bool),
                np.full(length, behavior, dtype=np.float32),
                (VersionSpan(0, 0, length),),
                "stop",
                "",
            )
        )
        rewards.append(Reward("ok", float(sample % 2)))
    return ScoredGroup(RolloutGroup(prompt, tuple(rollouts), "generator-0"), tuple(rewards))


class _Held:
    """`learner.json` below `directory` as a pipe: whoever writes it waits until it is read."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._path = directory / "learner.json"

    def __enter__(self) -> _Held:
        os.mkfifo(self._path)
        self._pipe = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, 4096)  # less than is written
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pipe)

    async def let_go(self) -> None:
        self._path.unlink()
        os.set_blocking(self._pipe, True)
        with os.fdopen(os.dup(self._pipe), "rb") as pipe:
            content = await asyncio.to_thread(pipe.read)
        assert len(content) > 4096


def spoil_the_weights(actor: Any) -> None:
    next(actor._learner.learner.model.parameters()).data.fill_(float("nan"))


def items(*groups: ScoredGroup) -> list[TrainItem]:
    def item(scored: ScoredGroup) -> TrainItem:
        reference = tuple(np.full(len(r.token_ids), -4.7, dtype=np.float32) for r in scored.rollouts)
        return TrainItem(group_info(scored.group, scored.rewards), ray.put(scored), ray.put(reference))

    return [item(scored) for scored in groups]


async def test_from_groups_to_weights_and_back_and_the_death_of_a_rank(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from rlsys.weights.publish import unpack, verify

    learner = await start_learner(config(), tiny_model)
    try:
        first = await learner.publish()
        assert first.version == 0
        batch = [group(i, seed=i) for i in range(4)]
        report = await learner.step(items(*batch))
        assert report.version == 1
        assert report.skipped is None
        assert report.tokens == sum(len(r.token_ids) for g in batch for r in g.rollouts)
        metrics = {name: metric.value() for name, metric in report.metrics.items()}
        assert metrics["learner/skipped_updates"] == 0
        assert metrics["learner/tokens"] == 2 * report.tokens  # two epochs
        assert {"learner/loss", "learner/grad_norm", "critic/loss", "learner/sampler_difference"} <= metrics.keys()

        weights = await learner.publish()
        assert weights.version == 1
        payload = await weights.payload
        verify(payload, weights.manifest)
        tensors = {name: tensor.clone() for name, tensor in unpack(payload, weights.manifest).items()}
        old = unpack(await first.payload, first.manifest)
        assert any(not np.array_equal(tensors[name], old[name]) for name in tensors)
        assert weights.probe.logprobs != first.probe.logprobs

        written = await learner.save(tmp_path / "checkpoint")
        await written
        saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint" / "hf").named_parameters())
        assert saved.keys() == tensors.keys()
        for name in saved:
            np.testing.assert_array_equal(saved[name].detach(), tensors[name])

        with _Held(tmp_path / "held") as held:  # a second checkpoint, which cannot be completed for now
            written = await learner.save(tmp_path / "held")
            async with asyncio.timeout(60):
                await learner.step(items(group(9, seed=9)))
                assert (await learner.publish()).probe != weights.probe
            assert not written.done()  # type: ignore[attr-defined]
            learner._timeout_s = 0.1
            with pytest.raises(LearnerError, match="the checkpoint before is still being written"):
                await learner.save(tmp_path / "third")
            await held.let_go()
        await written
        for file in ("policy-00000.safetensors", "critic-00000.safetensors", "hf/model.safetensors"):
            assert (tmp_path / "held" / file).read_bytes() == (tmp_path / "checkpoint" / file).read_bytes()
        assert await learner.load(tmp_path / "checkpoint") == 1
        assert (await learner.publish()).probe == weights.probe

        with pytest.raises(NonFiniteError, match="sums/7@0#"):
            await learner.step(items(group(6, seed=1), group(7, seed=2, behavior=float("nan"))))
        (item,) = items(group(6, seed=1))
        lies = (np.full(1, -4.7, dtype=np.float32),) * 4
        with pytest.raises(LearnerError, match=r"sums/6@0#0: reference log-probs of shape \[1\] .* from the reference"):
            await learner.step([replace(item, reference=ray.put(lies))])
        completed = await learner.progress()
        await learner.publish()
        for actor in learner.actors:
            await actor.__ray_call__.remote(spoil_the_weights)
        with pytest.raises(NonFiniteError, match="learner: its log-probs of the probe are not finite with version 1"):
            await learner.publish()
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        held = learner.actors[1].__ray_call__.remote(lambda actor: pipe.read_text())  # nobody writes: for ever
        assert await learner.progress() == completed + 1
        reports = await learner.inspect()
        assert [report.worker for report in reports] == ["learner-0", "learner-1"]
        os.kill(reports[1].pid, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            await held
        with pytest.raises(WorkerDied, match="learner-1"):
            await learner.progress()
        with pytest.raises(WorkerDied) as caught:
            async with asyncio.timeout(60):
                await learner.step(items(group(6, seed=1)))
        assert caught.value.worker == "learner-1"
    finally:
        await learner.close()


def wire(address: str) -> Any:
    """TCP in the place of NCCL, which waits for a "go" before it sends. Nested, to travel to the actor by value."""

    def connect(_: str, port: int, world_size: int) -> Any:
        from torch.distributed import TCPStore

        store = TCPStore(address, port, is_master=True, wait_for_workers=False)

        class Wire:
            def broadcast(self, tensors: Any) -> None:
                store.wait(["go"])
                for place, (_, tensor) in enumerate(tensors):
                    store.set(str(place), tensor.numpy().tobytes())

        return Wire()

    return connect


async def test_weights_are_sent_beside_training(tiny_model: Path) -> None:
    """`weights.engine: nccl`: a version goes out unchanged while the next step is trained on."""
    from torch.distributed import TCPStore
    from transformers import AutoModelForCausalLM

    settings = config(weights={"engine": "nccl"}, algorithm={"regularize": []}, learner={"ranks": 1, "threads": 1})
    learner = await start_learner(settings, tiny_model, wire("127.0.0.1"))
    try:
        async with asyncio.timeout(60):
            published = await learner.publish()
            meeting = await published.payload.meet("generator-0", 1)
            await published.payload.join("generator-0")
            store = TCPStore("127.0.0.1", meeting["master_port"], is_master=False)
            sending = asyncio.ensure_future(published.payload.send("generator-0", 0))
            report = await learner.step([replace(item, reference=None) for item in items(group(0, seed=0))])
            assert report.version == 1
            assert not sending.done()
            store.set("go", "")
            await sending
            with pytest.raises(WeightUpdateError, match="version 9 for generator-0 is no longer held"):
                await published.payload.send("generator-0", 9)
            table = published.manifest["tensors"]
            got = [np.frombuffer(store.get(str(place)), dtype=e["dtype"]) for place, e in enumerate(table)]
    finally:
        await learner.close()
    initial = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    assert [entry["name"] for entry in table] == list(initial)
    for entry, array in zip(table, got, strict=True):
        np.testing.assert_array_equal(array.reshape(entry["shape"]), initial[entry["name"]].detach().numpy())


async def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        await start_learner(config(learner={"ranks": 1}), tmp_path / "nothing")
