"""A tracker of every prompt's value, for one response per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.advantages.optimal_value import prompt_key
from rlsys.metrics import Mean
from rlsys.registry import Positive, UnitInterval
from rlsys.types import RolloutBatch

PRIOR = 0.5  # of both counts, for a prompt that was never seen


@dataclass
class TrackedBaseline(Estimator):
    """Score minus what the tracker of the prompt expected; no group is needed::

        v = alpha / (alpha + beta)                 before this visit; alpha = beta = 1/2 at the first
        A = r - v
        D = mean_t |log pi_then - log pi_now|      of the response at the last visit, pi_now at the start of this step
        rho = clip(2^(-D / half), lowest, highest)             highest at the first visit
        alpha <- rho * alpha + r       beta <- rho * beta + (1 - r)

    Xu and Ding 2025 (SPO), equations 4 to 8: half = 0.06, lowest = 0.875, highest = 0.96. The more the policy has
    changed, the faster the past is forgotten. Scores are in [0, 1]; for those in between the update is an exponential
    moving average. With several responses of a prompt in a batch their mean counts as one. The paper whitens the
    advantages over the batch (adjustment `whiten` over sequences), starts trackers from 8 samples of each prompt, and
    draws prompts by sqrt(v * (1 - v)).
    """

    name = "tracked-baseline"
    paper = "Xu and Ding 2025, Single-stream Policy Optimization, arXiv:2509.13232"
    unverified = (
        "D is measured at the next visit of the prompt instead of right after the step; trackers start from 1/2"
    )

    half: Positive = 0.06
    lowest: UnitInterval = 0.875
    highest: UnitInterval = 0.96
    counts: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)
    last: dict[str, dict[str, list[Any]]] = field(default_factory=dict, init=False)

    def prompt_value(self, prompt_id: str) -> float | None:
        alpha, beta = self.counts.get(prompt_key(prompt_id), (PRIOR, PRIOR))
        return alpha / (alpha + beta)

    def replay(self, batch: RolloutBatch) -> RolloutBatch | None:
        """The last response of each prompt of the batch that was seen before, in order of first appearance."""
        known = [self.last[key] for key in _keys(batch.prompt_ids_B) if key in self.last]
        # What the batch brings itself is kept as the last response once the advantages are estimated.
        self._fresh = _last_responses(batch)
        if not known:
            return None
        prompts = np.array([len(entry["prompt"]) for entry in known], dtype=np.int64)
        responses = np.array([len(entry["response"]) for entry in known], dtype=np.int64)
        width, length = int(responses.max()), int((prompts + responses).max())
        ids = np.zeros((len(known), length), dtype=np.int64)
        logprobs = np.zeros((len(known), width), dtype=np.float32)
        for row, entry in enumerate(known):
            both = entry["prompt"] + entry["response"]
            ids[row, : len(both)] = both
            logprobs[row, : len(entry["logprobs"])] = entry["logprobs"]
        return RolloutBatch(
            input_ids_BL=ids,
            prompt_lengths_B=prompts,
            response_lengths_B=responses,
            mask_BT=np.arange(width) < responses[:, None],
            behavior_logprobs_BT=logprobs,
            versions_BT=np.zeros((len(known), width), dtype=np.int32),
            scores_B=np.zeros(len(known), dtype=np.float32),
            scored_B=np.ones(len(known), dtype=bool),
            group_B=np.arange(len(known)),
            names_B=tuple(f"replay/{row}#0" for row in range(len(known))),
            reference_logprobs_BT=None,
        )

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        keys = _keys(inputs.prompt_ids)
        distance = self._distances(keys, inputs)
        count, mean, _ = group_statistics(inputs.scores, inputs.group, inputs.scored)
        baseline = torch.zeros(len(inputs.scores), dtype=torch.float64)
        for row, prompt_id in enumerate(inputs.prompt_ids):
            alpha, beta = self.counts.get(prompt_key(prompt_id), (PRIOR, PRIOR))
            baseline[row] = alpha / (alpha + beta)
        values, forgetting = [], []
        seen: set[str] = set()
        for row, prompt_id in enumerate(inputs.prompt_ids):
            key = prompt_key(prompt_id)
            if key in seen or count[row] == 0:
                continue
            seen.add(key)
            rho = min(max(2 ** (-distance.get(key, 0.0) / self.half), self.lowest), self.highest)
            alpha, beta = self.counts.get(key, (PRIOR, PRIOR))
            reward = min(1.0, max(0.0, float(mean[row])))
            self.counts[key] = (rho * alpha + reward, rho * beta + 1 - reward)
            values.append(float(baseline[row]))
            forgetting.append(rho)
        self.last |= {key: entry for key, entry in getattr(self, "_fresh", {}).items() if key in seen}
        metrics = {"spo/value": Mean.of(values), "spo/forgetting": Mean.of(forgetting)}
        scores = torch.where(inputs.scored, inputs.scores, 0).double()
        return Advantages(to_tokens(torch.where(inputs.scored, scores - baseline, 0), inputs.mask), metrics=metrics)

    def _distances(self, keys: list[str], inputs: AdvantageInputs) -> dict[str, float]:
        """D of each prompt that was seen before."""
        known = [key for key in keys if key in self.last]
        if inputs.rescored is None:
            return {}
        out = {}
        for row, key in enumerate(known):
            then = torch.tensor(self.last[key]["logprobs"], dtype=torch.float64)
            out[key] = float((then - inputs.rescored[row, : len(then)].double()).abs().mean()) if len(then) else 0.0
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"counts": {key: list(pair) for key, pair in self.counts.items()}, "last": dict(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = {key: (pair[0], pair[1]) for key, pair in state["counts"].items()}
        self.last = dict(state["last"])


def _keys(prompt_ids: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(prompt_key(prompt_id) for prompt_id in prompt_ids))


def _last_responses(batch: RolloutBatch) -> dict[str, dict[str, list[Any]]]:
    """One response of each prompt: the first that was scored and has tokens."""
    out: dict[str, dict[str, list[Any]]] = {}
    for row, prompt_id in enumerate(batch.prompt_ids_B):
        start, length = int(batch.prompt_lengths_B[row]), int(batch.response_lengths_B[row])
        if prompt_key(prompt_id) in out or not batch.mask_BT[row].any():
            continue
        ids = batch.input_ids_BL[row]
        out[prompt_key(prompt_id)] = {
            "prompt": ids[:start].tolist(),
            "response": ids[start : start + length].tolist(),
            "logprobs": [float(x) for x in batch.behavior_logprobs_BT[row, :length]],
        }
    return out
