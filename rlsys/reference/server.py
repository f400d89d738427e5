"""Log-probs of the reference policy, one group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rlsys.config.models import Config
from rlsys.models.loading import load_causal_lm, torch_dtype
from rlsys.models.logprobs import PolicyModel
from rlsys.types import Rollout, ScoredGroup


class ReferenceServer:
    """A frozen `transformers` model. A plain class; no Ray.

    Groups are never scored together: a batch's composition changes the last bits of its results, and which groups
    arrive at the same time is chance. `model_path` is used unless `reference.path` names another model.
    """

    def __init__(self, config: Config, model_path: str | Path) -> None:
        self._device = torch.device("cuda" if config.profile == "gpu" else "cpu")
        if config.profile == "cpu":
            torch.set_num_threads(config.reference.threads or 1)
        model = load_causal_lm(config.reference.path or model_path, torch_dtype(config.model.dtype))
        self._model = PolicyModel(model).to(self._device).requires_grad_(False)
        self._budget = config.reference.micro_batch_tokens
        self._chunk = config.learner.logprob_chunk
        self._temperature = config.rollout.temperature

    @torch.no_grad()
    def logprobs(self, group: ScoredGroup) -> tuple[np.ndarray, ...]:
        """One float32 [T] array per rollout: natural logarithms at the sampling temperature, as the learner's are."""
        prompt = group.prompt.token_ids
        out: list[np.ndarray] = []
        for rollouts in self._micro_batches(group):
            responses = np.array([len(r.token_ids) for r in rollouts], dtype=np.int64)
            ids = np.zeros((len(rollouts), len(prompt) + int(responses.max())), dtype=np.int64)
            for row, rollout in zip(ids, rollouts, strict=True):
                row[: len(prompt)] = prompt
                row[len(prompt) : len(prompt) + len(rollout.token_ids)] = rollout.token_ids
            logprobs, _ = self._model(
                torch.from_numpy(ids).to(self._device),
                torch.full((len(rollouts),), len(prompt), device=self._device),
                torch.from_numpy(responses).to(self._device),
                width=int(responses.max()),
                chunk=self._chunk,
                temperature=self._temperature,
                entropy=False,
                packed=False,
            )
            out += [row[:length] for row, length in zip(logprobs.cpu().numpy(), responses, strict=True)]
        return tuple(out)

    def _micro_batches(self, group: ScoredGroup) -> Iterator[list[Rollout]]:
        """Rollouts in order, as many at a time as fit in `reference.micro_batch_tokens`, padding included."""
        held: list[Rollout] = []
        longest = 0
        for rollout in group.rollouts:
            length = len(group.prompt.token_ids) + len(rollout.token_ids)
            if held and (len(held) + 1) * max(longest, length) > self._budget:
                yield held
                held, longest = [], 0
            held.append(rollout)
            longest = max(longest, length)
        if held:
            yield held
