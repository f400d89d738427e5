"""From the driver's terms to vLLM's and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlsys.errors import DataError, EngineError
from rlsys.roles import Sampling
from rlsys.types import FinishReason, Prompt, Rollout, RolloutGroup, VersionSpan

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams


def sampling_params(prompt: Prompt, sampling: Sampling) -> SamplingParams:
    """One request for the whole group: vLLM seeds sample i with `seed + i`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        seed=prompt.seed,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop),
        ignore_eos=sampling.ignore_eos,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def requests(sampling: Sampling) -> list[Sampling]:
    """What the engine is asked for, for one prompt: the samples, and a greedy rollout."""
    asked = [sampling] if sampling.n else []
    return [*asked, replace(sampling, n=1, temperature=0.0, top_p=1.0, top_k=-1)] if sampling.greedy else asked


def to_group(prompt: Prompt, sampling: Sampling, outputs: Sequence[RequestOutput], generator: str) -> RolloutGroup:
    """`outputs` answer `requests(sampling)`; with `sampling.expert` the demonstration comes last.

    Raises EngineError when vLLM ended a sample for another reason than its end or its length, DataError for a prompt
    without a demonstration where one is wanted.
    """
    completions = [completion for output in outputs for completion in output.outputs]
    rollouts = [replace(_to_rollout(prompt, completion), origin=sampling.origin) for completion in completions]
    if sampling.greedy:
        rollouts[-1] = replace(rollouts[-1], sample=sampling.n, origin="greedy")
    if sampling.expert:
        rollouts.append(expert_rollout(prompt, len(rollouts)))
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts), generator=generator)


def expert_rollout(prompt: Prompt, sample: int) -> Rollout:
    """The demonstration of a prompt. Raises DataError when it has none."""
    demonstration = prompt.demonstration
    if demonstration is None:
        raise DataError(
            f"prompt {prompt.id} has no demonstration, and the algorithm learns from one (demonstration_key)"
        )
    length = len(demonstration.token_ids)
    return Rollout(
        prompt_id=prompt.id,
        sample=sample,
        token_ids=demonstration.token_ids,
        action_mask=np.ones(length, dtype=bool),
        behavior_logprobs=np.zeros(length, dtype=np.float32),
        version_spans=(),
        finish_reason="stop",
        text=demonstration.text,
        origin="expert",
    )


def _to_rollout(prompt: Prompt, completion: CompletionOutput) -> Rollout:
    from vllm.logprobs import FlatLogprobs

    reason: FinishReason
    match completion.finish_reason:
        case "stop":
            reason = "stop"
        case "length":
            reason = "length"
        case other:
            raise EngineError(f"prompt {prompt.id}: vLLM ended sample {completion.index} with {other!r}")
    assert isinstance(completion.logprobs, FlatLogprobs)
    token_ids = np.array(completion.token_ids, dtype=np.int32)
    return Rollout(
        prompt_id=prompt.id,
        sample=completion.index,
        token_ids=token_ids,
        action_mask=np.ones(len(token_ids), dtype=bool),
        behavior_logprobs=np.array(completion.logprobs.logprobs, dtype=np.float32),
        version_spans=tuple(VersionSpan(int(version), start, end) for version, start, end in _spans(completion)),
        finish_reason=reason,
        text=completion.text,
    )


def _spans(completion: CompletionOutput) -> list[tuple[str, int, int]]:
    spans = completion.weight_versions or []
    return [(span.version, span.start, span.end) for span in spans if span.end > span.start]
