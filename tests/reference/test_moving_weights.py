"""A reference that is an average of two models, or follows the policy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.config.models import Config
from rlsys.errors import DataError, WeightUpdateError
from rlsys.reference.averaging import blend
from rlsys.reference.server import ReferenceServer
from rlsys.types import Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, VersionSpan


def config(dtype: str = "float32", **reference: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "unused", "dtype": dtype},
            "prompts": {"train": {"kind": "sums"}},
            "rewards": {"functions": [{"name": "sums", "kind": "sums"}]},
            "reference": reference,
        }
    )


def group() -> ScoredGroup:
    rng = np.random.default_rng(3)
    prompt = Prompt("p/0@0", 0, rng.integers(2, 90, 6).astype(np.int32), "?", "sums", "1", 3)
    tokens = rng.integers(2, 90, 9).astype(np.int32)
    rollout = Rollout(
        *(prompt.id, 0, tokens, np.ones(9, dtype=bool), np.zeros(9, dtype=np.float32)),
        *((VersionSpan(0, 0, 9),), "stop", ""),
    )
    return ScoredGroup(RolloutGroup(prompt, (rollout,), "generator-0"), (Reward("ok", 1.0),))


def changed(path: Path, change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights by Hugging Face name, tied ones once, straight from the model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return {name: change(p.detach()) for name, p in model.named_parameters()}


def saved(path: Path, change: Callable[[Tensor], Tensor], to: Path) -> Path:
    """A folder with a changed copy of the model in `path`."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(path, to)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(change(parameter))
    model.save_pretrained(to)
    return to


def scores(server: ReferenceServer) -> np.ndarray:
    return server.logprobs([group()])[0][0]


def scores_of(path: Path, change: Callable[[Tensor], Tensor], to: Path) -> np.ndarray:
    """By a frozen server of a model that has been saved with other weights."""
    return scores(ReferenceServer(config(), saved(path, change, to)))


def test_blend() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0]])}
    other = {"b": torch.tensor([[8.0]]), "a": torch.tensor([3.0, 0.0])}
    blend(weights, other, 0.75, "it")
    assert weights["a"].tolist() == [1.5, 1.5]
    assert weights["b"].tolist() == [[5.0]]
    blend(weights, other, 0.0, "it")
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    blend(weights, {"a": torch.zeros(2), "b": torch.zeros(1, 1)}, 1.0, "it")
    assert all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.parametrize("other", [{"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, {}])
def test_weights_of_another_model_change_nothing(other: dict[str, Tensor]) -> None:
    weights = {"a": torch.ones(2)}
    with pytest.raises(DataError, match=r"the file cannot be averaged with the reference: [ab] is"):
        blend(weights, other, 0.5, "the file")
    assert weights["a"].tolist() == [1, 1]


def test_it_becomes_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    server = ReferenceServer(config(update="every"), tiny_model)
    initial = scores(server)
    server.update(changed(tiny_model, lambda w: 0.7 * w), version=4)
    assert server.version == 4
    np.testing.assert_array_equal(scores(server), scores_of(tiny_model, lambda w: 0.7 * w, tmp_path / "policy"))
    assert np.abs(scores(server) - initial).max() > 0.01


def test_it_follows_the_policy_step_by_step(tiny_model: Path, tmp_path: Path) -> None:
    """0.9 of what it was each time: after factors 2 and 3 on all weights, 0.81 + 0.09 * 2 + 0.1 * 3."""
    server = ReferenceServer(config(update="moving_average", decay=0.9), tiny_model)
    server.update(changed(tiny_model, lambda w: 2 * w), version=1)
    server.update(changed(tiny_model, lambda w: 3 * w), version=2)
    expected = scores_of(tiny_model, lambda w: 1.29 * w, tmp_path / "average")
    np.testing.assert_allclose(scores(server), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_goes_on_exactly(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    def moved(server: ReferenceServer, factor: float, version: int) -> None:
        kind = torch.float32 if dtype == "float32" else torch.bfloat16
        server.update(changed(tiny_model, lambda w: factor * w, kind), version)

    settings = config(dtype, update="moving_average", decay=0.999)
    whole, first, second = (ReferenceServer(settings, tiny_model) for _ in range(3))
    for server in (whole, first):
        moved(server, 3.0, 1)
    first.save(tmp_path / "reference")
    assert second.load(tmp_path / "reference") == 1
    for server in (whole, second):
        for version in range(2, 6):
            moved(server, 3.0, version)
    np.testing.assert_array_equal(scores(second), scores(whole))
    assert second.version == 5


def test_a_slow_average_moves_in_bfloat16(tiny_model: Path) -> None:
    """A thousandth of the way at a time is less than bfloat16 tells apart; 400 of them are a third of the way."""
    server = ReferenceServer(config("bfloat16", update="moving_average", decay=0.999), tiny_model)
    initial, target = scores(server), changed(tiny_model, lambda w: 1.5 * w, torch.bfloat16)
    server.update(target, 1)
    np.testing.assert_array_equal(scores(server), initial)
    for version in range(2, 401):
        server.update(target, version)
    assert np.abs(scores(server) - initial).max() > 0.01


def test_an_average_of_two_models(tiny_model: Path, tmp_path: Path) -> None:
    other = saved(tiny_model, lambda w: 3 * w, tmp_path / "other")
    server = ReferenceServer(config(average_with=str(other), weight=0.75), tiny_model)
    expected = scores_of(tiny_model, lambda w: 1.5 * w, tmp_path / "average")
    np.testing.assert_allclose(scores(server), expected, atol=1e-5)


def smaller(tmp_path: Path) -> Path:
    from rlsys.config.models import TinyModelConfig
    from rlsys.models.tiny import build_model

    shape = TinyModelConfig(hidden_size=32, intermediate_size=80, layers=2, heads=2, key_value_heads=2, head_dim=16)
    model = build_model(shape, max_length=64, seed=0)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_models_that_do_not_fit_are_refused_at_the_start(tiny_model: Path, tmp_path: Path) -> None:
    small = smaller(tmp_path)
    with pytest.raises(DataError, match=r"reference\.average_with cannot be averaged"):
        ReferenceServer(config(average_with=str(small)), tiny_model)
    with pytest.raises(DataError, match=r"\(reference\.update\) cannot be averaged"):
        ReferenceServer(config(path=str(small), update="every"), tiny_model)
    ReferenceServer(config(path=str(small)), tiny_model)
    ReferenceServer(config(path=str(tiny_model), update="every"), tiny_model)


def test_a_missing_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reference\.safetensors, does not load"):
        ReferenceServer(config(update="every"), tiny_model).load(tmp_path)


@pytest.mark.slow
async def test_over_ray(tiny_model: Path, tmp_path: Path) -> None:
    import ray

    from rlsys.actors.reference import start_reference
    from rlsys.roles import Probe, PublishedWeights
    from rlsys.weights.publish import pack

    ray.init(
        address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, logging_level="ERROR"
    )
    try:
        reference = await start_reference(config(update="every"), tiny_model)
        assert await reference.load(await _saved(reference, tmp_path / "before")) == 0
        payload, manifest = pack(changed(tiny_model, lambda w: 0.7 * w).items(), version=6)
        weights = PublishedWeights(6, manifest, ray.put(payload), Probe((1, 2), (-0.5,)))
        await reference.update(weights)
        scored = group()
        [found] = await (await reference.logprobs([ray.put(scored)]))[0]
        np.testing.assert_array_equal(found, scores_of(tiny_model, lambda w: 0.7 * w, tmp_path / "policy"))
        damaged = PublishedWeights(7, {**manifest, "checksum": "xxh3_64:0"}, weights.payload, weights.probe)
        with pytest.raises(WeightUpdateError, match="checksum"):
            await reference.update(damaged)
        saved_to = await _saved(reference, tmp_path / "after")
        await reference.load(tmp_path / "before")
        assert await reference.load(saved_to) == 6
        [found_again] = await (await reference.logprobs([ray.put(scored)]))[0]
        np.testing.assert_array_equal(found_again, found)
        with pytest.raises(DataError, match="does not load"):
            await reference.load(tmp_path)
    finally:
        ray.shutdown()


async def _saved(reference: Any, directory: Path) -> Path:
    await reference.save(directory)
    return directory
