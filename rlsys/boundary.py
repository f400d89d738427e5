"""What a group of rollouts must be like before anybody uses it.

A group is checked where it was made (`check_sampled`: against what was asked for) and where a reward worker takes it
in (`check_received`: by itself, for a group that was damaged on its way). A refusal names generator, prompt and sample,
and has one of these kinds:

    prompt      it belongs to another prompt
    count       a sample is missing, too many, or of another origin than was asked for
    duplicate   a sample comes twice
    shape       an array is not one-dimensional, of another type, or of another length than the tokens
    tokens      a token id is outside of the vocabulary, or there are more tokens than were asked for
    log-probs   the log-prob of a sampled token is not finite, or above 0
    versions    the version spans do not cover the response in order
    segments    a segment lies outside of the response

Copies. Samples of a prompt have seeds of their own, so a second one repeats a completion y with the probability p(y),
which its log-probs say. Short and sure answers come twice all the time; a copy is refused where p(y) is below e^-30.
The chance to refuse an honest pair is less than that: sum over such y of p(y)^2 < e^-30 = 1e-13, once in twenty
thousand runs of a million groups with 32 samples each. Greedy samples are all alike, and not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, NoReturn

import numpy as np

from rlsys.errors import BadRollout, RolloutError
from rlsys.roles import Sampling
from rlsys.types import Origin, Prompt, Rollout, RolloutGroup, Segment, VersionSpan

OnRefused = Literal["retry", "stop"]

ROUNDING = 1e-4  # that a log-prob may be above 0
COPIED = -30.0  # log-prob of a whole completion, below which chance does not sample it twice

_DTYPES = {"token_ids": np.int32, "action_mask": np.bool_, "behavior_logprobs": np.float32}


class Fault(NamedTuple):
    """What is wrong: its kind, and in words."""

    kind: str
    words: str


def check_sampled(
    group: RolloutGroup,
    prompt: Prompt,
    sampling: Sampling,
    vocabulary: int | None = None,
    on_refused: OnRefused = "retry",
) -> None:
    """Raise BadRollout unless `group` can be the answer to `prompt` and `sampling`; RolloutError with "stop".

    `vocabulary`: token ids are below it.
    """
    name = f"{group.generator}: prompt {prompt.id}"
    if group.prompt.id != prompt.id or not np.array_equal(group.prompt.token_ids, prompt.token_ids):
        _refuse(group, f"{name}, all samples", Fault("prompt", f"they belong to prompt {group.prompt.id}"), on_refused)
    _check(group, name, vocabulary, on_refused)
    wanted: list[Origin] = [sampling.origin] * sampling.n
    if sampling.greedy:
        wanted.append("greedy")
    if sampling.expert:
        wanted.append("expert")
    have, want = len(group.rollouts), len(wanted)
    if have != want:
        fault = Fault("count", f"it is {'missing' if have < want else 'one too many'}, {want} were asked for")
        _refuse(group, f"{name}, sample {min(have, want)}", fault, on_refused)
    seen: dict[bytes, int] = {}
    for rollout, origin in zip(group.rollouts, wanted, strict=True):
        if found := _asked_fault(rollout, origin, sampling) or _copy_fault(rollout, sampling, seen):
            _refuse(group, f"{name}, sample {rollout.sample}", found, on_refused)


def check_received(group: RolloutGroup, receiver: str, on_refused: OnRefused = "retry") -> None:
    """Raise BadRollout, which names the generator, for a group that `receiver` cannot use; RolloutError with "stop"."""
    _check(group, f"{group.generator}, as {receiver} received it: prompt {group.prompt.id}", None, on_refused)


def segments_fault(segments: Sequence[Segment], length: int) -> Fault | None:
    """Whether segments lie in a response of `length` tokens."""
    for segment in segments:
        if not 0 <= segment.start <= segment.end <= length:
            words = f"segment [{segment.start}, {segment.end}) is outside of its {length} tokens"
            return Fault("segments", words)
    return None


def _refuse(group: RolloutGroup, whose: str, fault: Fault, on_refused: OnRefused) -> NoReturn:
    message = f"{whose}: {fault.words}"
    if on_refused == "stop":
        raise RolloutError(f"rollout.on_refused is stop, and rollouts were refused: {message}", kind=fault.kind)
    raise BadRollout(message, kind=fault.kind, generator=group.generator)


def _check(group: RolloutGroup, name: str, vocabulary: int | None, on_refused: OnRefused) -> None:
    for place, rollout in enumerate(group.rollouts):
        if fault := _place_fault(rollout, place, group.prompt) or _rollout_fault(rollout, vocabulary):
            _refuse(group, f"{name}, sample {rollout.sample}", fault, on_refused)


def _place_fault(rollout: Rollout, place: int, prompt: Prompt) -> Fault | None:
    if rollout.prompt_id != prompt.id:
        return Fault("prompt", f"it belongs to prompt {rollout.prompt_id}")
    if rollout.sample < place:
        return Fault("duplicate", f"it comes twice, or out of order, as number {place} of its group")
    if rollout.sample > place:
        return Fault("count", f"it comes where sample {place} is missing")
    return None


def _rollout_fault(rollout: Rollout, vocabulary: int | None) -> Fault | None:
    for what, dtype in _DTYPES.items():
        array = getattr(rollout, what)
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
            found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            return Fault("shape", f"its {what} are {found}, not {np.dtype(dtype)} [T]")
    ids, chosen, logprobs = rollout.token_ids, rollout.action_mask, rollout.behavior_logprobs
    length = len(ids)
    if len(chosen) != length or len(logprobs) != length:
        return Fault(
            "shape", f"it has {length} token_ids, {len(chosen)} action_mask and {len(logprobs)} behavior_logprobs"
        )
    if length and (ids.min() < 0 or (vocabulary is not None and ids.max() >= vocabulary)):
        bad = int(np.argmax((ids < 0) | (ids >= (vocabulary or np.inf))))
        return Fault("tokens", f"response token {bad} has the id {ids[bad]}, outside of the vocabulary")
    if rollout.origin == "expert":
        if logprobs.any() or rollout.version_spans:
            return Fault("log-probs", "it is a demonstration, yet has log-probs or versions")
        return segments_fault(rollout.segments, length)
    return (
        _logprobs_fault(logprobs, chosen)
        or _spans_fault(rollout.version_spans, length)
        or segments_fault(rollout.segments, length)
    )


def _logprobs_fault(logprobs: np.ndarray, chosen: np.ndarray) -> Fault | None:
    # A NaN is the smallest of its array, and the largest.
    if not len(logprobs) or (logprobs.min() > -np.inf and logprobs.max() <= ROUNDING):
        return None
    bad = np.flatnonzero(chosen & ~((logprobs > -np.inf) & (logprobs <= ROUNDING)))
    if not len(bad):
        return None  # tokens of a tool, which have none that matter
    why = "above 0" if logprobs[bad[0]] > 0 else "not finite"
    return Fault("log-probs", f"the log-prob of response token {bad[0]} is {logprobs[bad[0]]}, {why}")


def _spans_fault(spans: Sequence[VersionSpan], length: int) -> Fault | None:
    version, end = 0, 0
    for span in spans:
        if span.start != end or span.end <= end or span.version < version:
            break
        version, end = span.version, span.end
    else:
        if end == length:
            return None
    found = ", ".join(f"{version}: [{start}, {end})" for version, start, end in spans) or "none"
    return Fault(
        "versions", f"its spans do not cover its {length} tokens in order, with versions that never fall: {found}"
    )


def _asked_fault(rollout: Rollout, origin: Origin, sampling: Sampling) -> Fault | None:
    if rollout.origin != origin:
        return Fault("count", f"its origin is {rollout.origin!r}, {origin!r} was asked for")
    if origin != "expert" and len(rollout.token_ids) > sampling.max_new_tokens:
        return Fault("tokens", f"it has {len(rollout.token_ids)} tokens, {sampling.max_new_tokens} were asked for")
    return None


def _copy_fault(rollout: Rollout, sampling: Sampling, seen: dict[bytes, int]) -> Fault | None:
    """Whether it repeats an earlier one by no chance; `seen` has those."""
    if rollout.origin in ("expert", "greedy") or sampling.temperature == 0:
        return None
    first = seen.setdefault(rollout.token_ids.tobytes(), rollout.sample)
    if first == rollout.sample:
        return None
    logprob = float(rollout.behavior_logprobs[rollout.action_mask].sum())
    if logprob >= COPIED:
        return None
    return Fault("duplicate", f"it is a copy of sample {first}, and with a log-prob of {logprob:.0f} not by chance")
