"""The responses of a report as the script of the page has them: as plain values, which it puts in as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, Protocol

from rlsys.report.evaluations import HeldOut
from rlsys.report.samples import Response, Sample


class _Chosen(Protocol):
    """What was chosen of a run: `Samples`, or `Evaluations`."""

    @property
    def shown(self) -> Sequence[Any]: ...

    @property
    def kinds(self) -> Mapping[str, Sequence[int]]: ...


def buttons(kinds: Mapping[str, str], chosen: Sequence[_Chosen]) -> list[tuple[str, str, int]]:
    """Each kind, its title, and how many there are of it in all runs."""
    return [(kind, title, sum(len(of_run.kinds[kind]) for of_run in chosen)) for kind, title in kinds.items()]


def together(chosen: Sequence[_Chosen], plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Everything of all runs, and of each kind its places: the runs take turns, so that each is seen."""
    starts = [sum(len(of_run.shown) for of_run in chosen[:i]) for i in range(len(chosen))]
    kinds = {}
    for kind in chosen[0].kinds:
        own = [[start + place for place in one.kinds[kind]] for start, one in zip(starts, chosen, strict=True)]
        kinds[kind] = [place for place in chain.from_iterable(zip_longest(*own)) if place is not None]
    shown = [{"run": place, **plain(one)} for place, of_run in enumerate(chosen) for one in of_run.shown]
    return {"shown": shown, "kinds": kinds}


def plain_sample(sample: Sample) -> dict[str, Any]:
    origin = "" if sample.origin == "policy" else sample.origin
    fate = sample.fate if sample.fate != "trained" else f"trained at step {sample.step}"
    return {
        "step": sample.step,
        "id": sample.prompt_id,
        "number": sample.number,
        "prompt": sample.prompt,
        "answer": sample.answer,
        "text": sample.text,
        "pieces": [list(piece) for piece in sample.pieces],
        "score": sample.score,
        "status": sample.status,
        "group": list(sample.group),
        "place": sample.place,
        "facts": _facts_of(sample, origin, fate),
    }


def plain_held_out(prompt: HeldOut) -> dict[str, Any]:
    return {
        "id": prompt.prompt_id,
        "prompt": prompt.prompt,
        "answer": prompt.answer,
        "rise": prompt.rise,
        "fall": prompt.fall,
        "evaluations": [
            {
                "step": one.step,
                "score": one.score,
                "count": one.count,
                "responses": [
                    {"text": found.text, "score": found.score, "status": found.status, "facts": _facts_of(found)}
                    for found in one.responses
                ],
            }
            for one in prompt.evaluations
        ],
    }


def _facts_of(response: Response, *more: str) -> list[str]:
    facts = [
        f"{response.tokens} tokens",
        f"weights {response.versions}" if response.versions else "",
        response.finish,
        *(f"{name} {value:.4g}" for name, value in response.components.items()),
        *more,
    ]
    if response.status != "ok":
        facts.append(f"reward: {response.status}" + (f" ({response.detail})" if response.detail else ""))
    return [fact for fact in facts if fact]
