"""Log-probs of the reference policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlsys.config.models import Config
from rlsys.durable import writing
from rlsys.errors import DataError
from rlsys.models.loading import load_causal_lm, torch_dtype
from rlsys.models.logprobs import PolicyModel
from rlsys.reference.averaging import blend, check_alike
from rlsys.types import ScoredGroup

WEIGHTS = "reference.safetensors"


class ReferenceServer:
    """A `transformers` model that does not train. A plain class; no Ray.

    `model_path` is used unless `reference.path` names another model;
    `reference.average_with` averages its weights with those of a second one. `update` takes the policy's weights in, as
    `reference.update` says; `version` is the newest of them, 0 before the first.
    """

    def __init__(self, config: Config, model_path: str | Path) -> None:
        """Raises DataError for models that do not load or do not fit together."""
        reference = config.reference
        self._device = torch.device("cuda" if config.profile == "gpu" else "cpu")
        if config.profile == "cpu":
            torch.set_num_threads(reference.threads or 1)
        dtype = torch_dtype(config.model.dtype)
        policy = PolicyModel(load_causal_lm(reference.path or model_path, dtype))
        if reference.average_with is not None:
            other = PolicyModel(load_causal_lm(reference.average_with, dtype))
            blend(_weights(policy), _weights(other), reference.weight, "reference.average_with")
        if reference.update != "frozen" and reference.path is not None:
            # Now, and not at the first update, which may be hours away.
            check_alike(_weights(policy), _weights(_empty(model_path)), f"the policy {model_path} (reference.update)")
        self._model = policy.to(self._device).requires_grad_(False)
        self._weights = _weights(self._model)
        self._share = reference.decay if reference.update == "moving_average" else 0.0
        # A step of a slow average is less than bfloat16 can tell, so it is kept in float32 beside the model.
        self._average = self._weights
        if reference.update == "moving_average" and dtype != torch.float32:
            self._average = {name: tensor.float() for name, tensor in self._weights.items()}
        self.version = 0
        self._budget = reference.micro_batch_tokens
        self._chunk = config.learner.logprob_chunk
        self._temperature = config.rollout.temperature

    def update(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Become the policy's weights (`every`), or go a step towards them (`moving_average`).

        `weights` by Hugging Face name. Raises DataError for the weights of another model; nothing is changed then.
        """
        blend(self._average, weights, self._share, f"the policy's version {version}")
        self._show_average()
        self.version = version

    def save(self, directory: Path) -> None:
        """Write the weights below `directory`, exactly. Raises DiskFullError."""
        held = {name: tensor.cpu().contiguous() for name, tensor in self._average.items()}
        with writing(directory / WEIGHTS):
            directory.mkdir(parents=True, exist_ok=True)
            save_file(held, directory / WEIGHTS, {"version": str(self.version)})

    def load(self, directory: Path) -> int:
        """Load what `save` wrote; return the version. Raises DataError when it is not there or does not fit."""
        path = directory / WEIGHTS
        try:
            with safe_open(path, framework="pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                version = int(file.metadata()["version"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"the reference in the checkpoint, {path}, does not load: {error}") from error
        blend(self._average, held, 0.0, str(path))
        self._show_average()
        self.version = version
        return version

    @torch.no_grad()
    def _show_average(self) -> None:
        """Round the average to the model's type."""
        if self._average is not self._weights:
            for name, tensor in self._weights.items():
                tensor.copy_(self._average[name])

    @torch.no_grad()
    def logprobs(self, groups: Sequence[ScoredGroup]) -> list[tuple[np.ndarray, ...]]:
        """For each group, one float32 [T] array per rollout: natural logarithms at the sampling temperature, as the
        learner's are.

        Which rollouts are scored together, of whatever groups, changes the last bits of a result.
        """
        rows = [_Row(group.prompt.token_ids, rollout.token_ids) for group in groups for rollout in group.rollouts]
        found: dict[int, np.ndarray] = {}
        for batch in self._micro_batches(rows):
            found |= zip(batch, self._forward([rows[i] for i in batch]), strict=True)
        numbers = itertools.count()
        return [tuple(found[next(numbers)] for _ in group.rollouts) for group in groups]

    def _forward(self, rows: Sequence[_Row]) -> list[np.ndarray]:
        """One pass, padded on the right."""
        prompts = np.array([len(row.prompt) for row in rows], dtype=np.int64)
        responses = np.array([len(row.response) for row in rows], dtype=np.int64)
        ids = np.zeros((len(rows), max(row.length for row in rows)), dtype=np.int64)
        for line, row in zip(ids, rows, strict=True):
            line[: row.length] = np.concatenate([row.prompt, row.response])
        logprobs, _ = self._model(
            *(torch.from_numpy(array).to(self._device) for array in (ids, prompts, responses)),
            width=int(responses.max()),
            chunk=self._chunk,
            temperature=self._temperature,
            entropy=False,
            packing="padded",
        )
        return [line[:length] for line, length in zip(logprobs.cpu().numpy(), responses, strict=True)]

    def _micro_batches(self, rows: Sequence[_Row]) -> Iterator[list[int]]:
        """Numbers of rows, longest first, as many at a time as fit in `reference.micro_batch_tokens`, padding
        included."""
        held: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: -rows[i].length):
            if held and (len(held) + 1) * rows[held[0]].length > self._budget:
                yield held
                held = []
            held.append(i)
        if held:
            yield held


class _Row(NamedTuple):
    """A rollout after its prompt."""

    prompt: np.ndarray
    response: np.ndarray

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


def _empty(path: str | Path) -> PolicyModel:
    """The model in `path` without its weights: names and shapes only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return PolicyModel(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(path))))


def _weights(policy: PolicyModel) -> dict[str, Tensor]:
    """Parameters by Hugging Face name, tied ones once, sharing memory with the model."""
    return {policy.hf_names[name]: parameter.data for name, parameter in policy.named_parameters()}
