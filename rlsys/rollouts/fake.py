"""A generator without vLLM, with the interface of `engine.VllmGenerator`: for tests that need no language model.

Its policy is a unigram: one logit per token, which weight updates replace. It samples one token of every running
rollout at a time and lets the event loop run in between, so updates arrive in the midst of rollouts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlsys.config.models import Config
from rlsys.errors import EngineError, WeightUpdateError, WorkerDied
from rlsys.roles import PublishedWeights, Sampling, UpdateReport
from rlsys.rollouts.convert import expert_rollout
from rlsys.rollouts.probe import check_probe
from rlsys.types import FinishReason, Prompt, Rollout, RolloutGroup, VersionSpan
from rlsys.weights.expected import ExpectedTensors
from rlsys.weights.publish import unpack, verify

VOCABULARY = 32
END = 1  # the token that ends a response
TENSOR = "logits"  # the one tensor of its weights, float32 [VOCABULARY]


class FakeGenerator:
    """Starts with equal logits; text is the token ids with spaces between. Knows no stop strings, top-p or top-k."""

    vocabulary = VOCABULARY

    def __init__(self, name: str, config: Config, model_path: str | Path, version: int = 0) -> None:
        self.name = name
        self.version = version
        self._logits = np.zeros(VOCABULARY)
        self._expected = ExpectedTensors({TENSOR: (VOCABULARY,)}, {})
        self._agreed = False  # with the learner, about a probe
        self._tokens = 0
        self._running: set[asyncio.Task[RolloutGroup]] = set()
        self._started = False
        self._closed = False

    async def start(self) -> None:
        self._started = True

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Awaitable[RolloutGroup]]:
        self._check_running()
        tasks = [asyncio.create_task(self._sample_group(prompt, sampling), name=prompt.id) for prompt in prompts]
        self._running.update(tasks)
        for task in tasks:
            task.add_done_callback(self._running.discard)
        return list(tasks)

    async def progress(self) -> int:
        self._check_running()
        return self._tokens

    async def update(self, weights: PublishedWeights) -> UpdateReport:
        """Refuses what `VllmGenerator` refuses, with the old weights untouched."""
        self._check_running()
        began = time.perf_counter()
        if weights.manifest["version"] != weights.version or weights.version < self.version:
            message = f"{self.name} with version {self.version} cannot take {weights.version}"
            raise WeightUpdateError(message, kind="version")
        self._expected.check(weights.manifest)
        verify(weights.payload, weights.manifest)
        logits = unpack(weights.payload, weights.manifest)[TENSOR].numpy().astype(np.float64)
        found = log_softmax(logits)[list(weights.probe.token_ids[1:])]
        difference = check_probe(self.name, "a unigram", weights, found, "float32", self._agreed)
        self._agreed = True
        self._logits, self.version = logits, weights.version
        seconds = time.perf_counter() - began
        return UpdateReport(self.name, self.version, 0.0, 0.0, seconds, int(weights.manifest["bytes"]), difference)

    async def close(self) -> None:
        """Running and later calls raise WorkerDied."""
        self._closed = True

    def _check_running(self) -> None:
        if self._closed:
            raise WorkerDied(self.name, "it was closed")
        if not self._started:
            raise EngineError(f"{self.name} has not been started")

    async def _sample_group(self, prompt: Prompt, sampling: Sampling) -> RolloutGroup:
        rollouts = list(await asyncio.gather(*(self._sample(prompt, i, sampling) for i in range(sampling.n))))
        rollouts = [replace(rollout, origin=sampling.origin) for rollout in rollouts]
        if sampling.greedy:
            greedy = await self._sample(prompt, sampling.n, replace(sampling, temperature=0.0))
            rollouts.append(replace(greedy, origin="greedy"))
        if sampling.expert:
            rollouts.append(expert_rollout(prompt, len(rollouts)))
        return RolloutGroup(prompt, tuple(rollouts), self.name)

    async def _sample(self, prompt: Prompt, sample: int, sampling: Sampling) -> Rollout:
        rng = np.random.default_rng(prompt.seed + sample)
        tokens: list[int] = []
        logprobs: list[float] = []
        spans: list[VersionSpan] = []
        finish: FinishReason = "length"
        while len(tokens) < sampling.max_new_tokens:
            await asyncio.sleep(0)
            self._check_running()
            policy = log_softmax(self._logits / (sampling.temperature or 1.0))
            token = int(rng.choice(VOCABULARY, p=np.exp(policy))) if sampling.temperature else int(policy.argmax())
            tokens.append(token)
            logprobs.append(float(policy[token]))
            self._tokens += 1
            if not spans or spans[-1].version != self.version:
                spans.append(VersionSpan(self.version, len(tokens) - 1, len(tokens)))
            spans[-1] = spans[-1]._replace(end=len(tokens))
            if token == END and not sampling.ignore_eos:
                finish = "stop"
                break
        return Rollout(
            prompt_id=prompt.id,
            sample=sample,
            token_ids=np.array(tokens, dtype=np.int32),
            action_mask=np.ones(len(tokens), dtype=bool),
            behavior_logprobs=np.array(logprobs, dtype=np.float32),
            version_spans=tuple(spans),
            finish_reason=finish,
            text=" ".join(map(str, tokens)),
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [V] to float64 [V]."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
