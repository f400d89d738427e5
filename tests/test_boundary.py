"""Groups that a generator can have sampled pass; damaged in any one way, they are refused, and the culprit is named."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlsys.boundary import check_received, check_sampled
from rlsys.config.models import Config
from rlsys.errors import BadRollout, RolloutError
from rlsys.roles import Sampling
from rlsys.rollouts.fake import VOCABULARY, FakeGenerator
from rlsys.types import Demonstration, Prompt, Rollout, RolloutGroup, Segment, VersionSpan

CONFIG = Config.model_validate(
    {
        "model": {"path": "unused"},
        "prompts": {"train": {"kind": "sums"}},
        "rewards": {"functions": [{"name": "a", "kind": "sums"}]},
    }
)


class Asked(NamedTuple):
    prompt: Prompt
    sampling: Sampling
    group: RolloutGroup  # the honest answer


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """Prompts, samplings, and what the stand-in for vLLM samples; half of the tokens are of a later version."""
    demonstration = Demonstration("", np.array(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=5)), np.int32))
    prompt = Prompt("sums/17@0", 17, np.arange(4, dtype=np.int32), "", "", None, draw(st.integers(0, 10**6)), {})
    prompt = replace(prompt, demonstration=demonstration)
    sampling = Sampling(
        n=draw(st.integers(1, 5)),
        max_new_tokens=draw(st.integers(2, 40)),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0])),
        ignore_eos=draw(st.booleans()),
        greedy=draw(st.booleans()),
        expert=draw(st.booleans()),
        origin=draw(st.sampled_from(["policy", "hotter"])),
    )

    async def sample() -> RolloutGroup:
        generator = FakeGenerator("generator-3", CONFIG, Path("unused"), version=5)
        await generator.start()
        (answer,) = await generator.generate([prompt], sampling)
        for _ in range(sampling.max_new_tokens // 2):
            await asyncio.sleep(0)
        generator.version = 6
        return await answer

    return Asked(prompt, sampling, asyncio.run(sample()))


@given(asked())
def test_an_honest_group_passes(asked: Asked) -> None:
    check_sampled(asked.group, asked.prompt, asked.sampling, VOCABULARY)
    check_received(asked.group, "rewarder-0")


# Each damages one rollout and says of which kind that is.


def array_of_another_shape(rollout: Rollout, draw: Any) -> tuple[Rollout, str]:
    name = draw(st.sampled_from(["token_ids", "action_mask", "behavior_logprobs"]))
    array = getattr(rollout, name)
    damaged = draw(
        st.sampled_from(
            [
                array[:-1],
                np.append(array, array[-1:]).astype(array.dtype),
                array[None],
                array[:, None],
                array.astype(np.float64 if name == "behavior_logprobs" else np.int64),
                array.tolist(),
                None,
            ]
        )
    )
    return replace(rollout, **{name: damaged}), "shape"


def wrong_logprob(rollout: Rollout, draw: Any) -> tuple[Rollout, str]:
    logprobs = rollout.behavior_logprobs.copy()
    at = draw(st.integers(0, len(logprobs) - 1))
    logprobs[at] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.01, 40.0]))
    return replace(rollout, behavior_logprobs=logprobs), "log-probs"


def wrong_token(rollout: Rollout, draw: Any) -> tuple[Rollout, str]:
    ids = rollout.token_ids.copy()
    ids[draw(st.integers(0, len(ids) - 1))] = draw(st.sampled_from([-1, -(2**31)]))
    return replace(rollout, token_ids=ids), "tokens"


def wrong_spans(rollout: Rollout, draw: Any) -> tuple[Rollout, str]:
    spans = list(rollout.version_spans) or [VersionSpan(5, 0, len(rollout.token_ids))]
    at = draw(st.integers(0, len(spans) - 1))
    version, start, end = spans[at]
    match draw(st.sampled_from(["lost", "short", "late", "empty", "twice", "negative", "falling"])):
        case "lost":
            spans.pop(at)
        case "short":
            spans[at] = VersionSpan(version, start, end - 1)
        case "late":
            spans[at] = VersionSpan(version, start + 1, end)
        case "empty":
            spans.insert(at, VersionSpan(version, start, start))
        case "twice":
            spans.insert(at, spans[at])
        case "negative":
            spans[0] = spans[0]._replace(version=-1)
        case "falling":
            assume(end - start > 1)
            spans[at : at + 1] = [VersionSpan(version + 9, start, start + 1), VersionSpan(version, start + 1, end)]
    assume(tuple(spans) != rollout.version_spans)
    # a demonstration has no spans, nor log-probs
    return replace(rollout, version_spans=tuple(spans)), "log-probs" if rollout.origin == "expert" else "versions"


def wrong_segment(rollout: Rollout, draw: Any) -> tuple[Rollout, str]:
    length = len(rollout.token_ids)
    bad = draw(st.sampled_from([Segment(0, length + 1), Segment(-1, length), Segment(1, 0)]))
    return replace(rollout, segments=(Segment(0, 1), bad)), "segments"


def of_another_prompt(rollout: Rollout, draw: Any) -> tuple[Rollout, str]:
    return replace(rollout, prompt_id="sums/18@0"), "prompt"


Damage = Callable[[Rollout, Any], tuple[Rollout, str]]
DAMAGES: list[Damage] = [
    array_of_another_shape,
    wrong_logprob,
    wrong_token,
    wrong_spans,
    wrong_segment,
    of_another_prompt,
]


def refused(check: Callable[..., None], *arguments: Any) -> BadRollout:
    """The refusal, as it is after its way through Ray; with "stop", the same ends the run."""
    with pytest.raises(BadRollout) as caught:
        check(*arguments)
    error: BadRollout = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.kind, error.generator) == (str(caught.value), caught.value.kind, "generator-3")
    assert "generator-3" in str(error)
    assert "prompt sums/17@0" in str(error)
    with pytest.raises(RolloutError, match=r"rollout\.on_refused is stop") as stopped:
        check(*arguments, on_refused="stop")
    assert str(error) in str(stopped.value)
    return error


@pytest.mark.parametrize("damage", DAMAGES)
@given(asked=asked(), data=st.data())
def test_a_damaged_rollout_is_refused_at_both_ends(damage: Damage, asked: Asked, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(asked.group.rollouts) - 1))
    rollout = asked.group.rollouts[at]
    assume(len(rollout.token_ids))
    rollouts = list(asked.group.rollouts)
    rollouts[at], kind = damage(rollout, data.draw)
    group = replace(asked.group, rollouts=tuple(rollouts))
    for error in (
        refused(check_sampled, group, asked.prompt, asked.sampling, VOCABULARY),
        refused(check_received, group, "rewarder-1"),
    ):
        assert error.kind == kind
        assert f"sample {at}:" in str(error)
    assert "as rewarder-1 received it" in str(error)


@given(asked=asked(), data=st.data())
def test_samples_that_are_lost_doubled_or_swapped_are_refused(asked: Asked, data: st.DataObject) -> None:
    rollouts = list(asked.group.rollouts)
    at = data.draw(st.integers(0, len(rollouts) - 1))
    kind = data.draw(st.sampled_from(["lost", "doubled", "swapped", "too many"]))
    if kind == "lost":
        rollouts.pop(at)
    elif kind == "doubled":
        rollouts.insert(at, rollouts[at])
    elif kind == "swapped":
        assume(len(rollouts) > 1)
        other = (at + 1) % len(rollouts)
        rollouts[at], rollouts[other] = rollouts[other], rollouts[at]
    else:
        rollouts.append(replace(rollouts[0], sample=len(rollouts)))
    group = replace(asked.group, rollouts=tuple(rollouts))
    error = refused(check_sampled, group, asked.prompt, asked.sampling, VOCABULARY)
    assert error.kind in ("count", "duplicate")
    named = at if kind in ("lost", "doubled") else len(rollouts) - 1 if kind == "too many" else None
    assert named is None or f"sample {named}" in str(error)
    if kind in ("doubled", "swapped"):  # a reward worker does not know how many were asked for
        assert refused(check_received, group, "rewarder-1").kind in ("count", "duplicate")


@given(asked=asked())
def test_what_was_asked_for_is_compared(asked: Asked) -> None:
    def error(group: RolloutGroup, sampling: Sampling = asked.sampling, vocabulary: int = VOCABULARY) -> BadRollout:
        return refused(check_sampled, group, asked.prompt, sampling, vocabulary)

    group, (first, *rest) = asked.group, asked.group.rollouts
    others = replace(group.prompt, id="sums/18@0")
    of_others = tuple(replace(rollout, prompt_id=others.id) for rollout in group.rollouts)
    assert error(replace(group, prompt=others, rollouts=of_others)).kind == "prompt"
    assert error(replace(group, prompt=replace(group.prompt, token_ids=np.array([9], np.int32)))).kind == "prompt"
    assert error(group, vocabulary=int(first.token_ids.max())).kind == "tokens"
    assert error(replace(group, rollouts=(replace(first, origin="colder"), *rest))).kind == "count"
    longest = max(len(rollout.token_ids) for rollout in group.rollouts if rollout.origin != "expert")
    assert error(group, replace(asked.sampling, max_new_tokens=longest - 1)).kind == "tokens"


def answer(logprob: float, tokens: int = 20, sample: int = 0) -> Rollout:
    """One that is sampled with the given log-prob as a whole."""
    return Rollout(
        "p/0",
        sample,
        np.arange(tokens, dtype=np.int32),
        np.ones(tokens, bool),
        np.full(tokens, logprob / tokens, np.float32),
        (VersionSpan(0, 0, tokens),),
        "stop",
        "",
    )


def test_a_copy_is_refused_where_chance_does_not_make_one() -> None:
    prompt, sampling = Prompt("p/0", 0, np.zeros(1, np.int32), "", "", None, 0), Sampling(n=3, max_new_tokens=20)
    different = replace(answer(-80, sample=0), token_ids=np.arange(20, dtype=np.int32)[::-1].copy())

    def group(logprob: float) -> RolloutGroup:
        copies = (different, answer(logprob, sample=1), answer(logprob, sample=2))
        return RolloutGroup(prompt, copies, "generator-3")

    check_sampled(group(-29), prompt, sampling)  # e^-29: an unlikely answer, twice
    with pytest.raises(
        BadRollout, match=r"prompt p/0, sample 2: it is a copy of sample 1, and .* log-prob of -31"
    ) as e:
        check_sampled(group(-31), prompt, sampling)
    assert e.value.kind == "duplicate"
    check_sampled(group(-31), prompt, replace(sampling, temperature=0.0))  # greedy: all are alike
    check_received(group(-31), "rewarder-0")  # which does not know the temperature


def test_the_tokens_of_a_tool_have_no_logprobs_that_matter() -> None:
    prompt = Prompt("p/0", 0, np.zeros(1, np.int32), "", "", None, 0)
    mask, logprobs = np.ones(20, bool), np.full(20, -1, np.float32)
    mask[3:5] = False
    logprobs[3:5] = np.nan, 7
    rollout = replace(answer(-20), action_mask=mask, behavior_logprobs=logprobs)
    check_sampled(RolloutGroup(prompt, (rollout,), "generator-3"), prompt, Sampling(n=1, max_new_tokens=20))
