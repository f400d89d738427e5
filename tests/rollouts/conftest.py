"""What the engine tests share: a trainer with real weights of its own, and prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config.models import Config
from rlsys.roles import Probe, PublishedWeights
from rlsys.types import Prompt, Rollout, RolloutGroup
from rlsys.weights.publish import pack

END = 1  # end-of-sequence token of the tiny model


class Trainer:
    """A transformers model whose weights change, and which still knows every version it has published."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.version = 0
        self._states = {0: self._copy()}
        self._random = torch.Generator().manual_seed(0)

    def relabel(self, version: int) -> None:
        """Call the weights as they are `version`."""
        self.version = version
        self._states[version] = self._copy()

    def _copy(self) -> dict[str, Any]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def publish(self, version: int | None = None, change: float = 0.1) -> PublishedWeights:
        """A new version: every weight moved by a normal number times `change`."""
        import torch

        self.version = self.version + 1 if version is None else version
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.add_(torch.randn(tensor.shape, generator=self._random) * change)
        self._states[self.version] = self._copy()
        ids = list(range(3, 35))
        payload, manifest = pack(self.model.named_parameters(), self.version)
        probe = Probe(
            tuple(ids), tuple(self.logprobs(self.version, ids)[:-1].gather(1, _column(ids[1:]))[:, 0].tolist())
        )
        return PublishedWeights(self.version, manifest, payload, probe)

    def logprobs(self, version: int, ids: list[int], temperature: float = 1.0) -> Any:
        """Of every next token after every token, float32 [len(ids), V], by `transformers`."""
        import torch

        self.model.load_state_dict(self._states[version])
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0]
        self.model.load_state_dict(self._states[self.version])
        return (logits / temperature).log_softmax(-1)

    def of_response(self, version: int, prompt: Prompt, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
        """Log-prob of each response token under one version, float32 [T]."""
        response = rollout.token_ids.tolist()
        table = self.logprobs(version, [*prompt.token_ids.tolist(), *response], temperature)
        return table[len(prompt.token_ids) - 1 : -1].gather(1, _column(response))[:, 0].numpy()

    def differences(self, group: RolloutGroup, temperature: float = 1.0) -> np.ndarray:
        """|behaviour log-prob - that of the version which the token was recorded with|, of all tokens of a group."""
        parts = []
        for rollout in group.rollouts:
            by_version = {
                span.version: self.of_response(span.version, group.prompt, rollout, temperature)
                for span in rollout.version_spans
            }
            for version, start, end in rollout.version_spans:
                parts.append(np.abs(rollout.behavior_logprobs[start:end] - by_version[version][start:end]))
        return np.concatenate(parts)


def _column(ids: list[int]) -> Any:
    import torch

    return torch.tensor(ids)[:, None]


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Starting vLLM changes the environment; the tests of other modules should not see that."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def make_trainer() -> type[Trainer]:
    return Trainer


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    def make(path: Path, **sections: Any) -> Config:
        return Config.model_validate(
            {
                "model": {"path": str(path), "max_length": 256},
                "prompts": {"train": {"kind": "sums"}},
                "rewards": {"functions": [{"name": "sums", "kind": "sums"}]},
                "resources": {"cores": 2},
                "rollout": {"engine": {"kv_cache_gib": 0.05}},
                **sections,
            }
        )

    return make


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., list[Prompt]]:
    def make(count: int, length: int = 12, seed: int = 0) -> list[Prompt]:
        random = np.random.default_rng(seed)
        return [
            Prompt(
                f"p/{i}", i, random.integers(3, 90, length).astype(np.int32), "", "", None, seed=1000 * seed + 100 * i
            )
            for i in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output head of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("untied")
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
