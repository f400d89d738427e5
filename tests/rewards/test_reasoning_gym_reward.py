"""The reasoning-gym reward: each data set's own scorer."""

from __future__ import annotations

from array import array

import pytest

from rlsys.rewards import Sample
from rlsys.rewards.functions.reasoning_gym import ReasoningGym

PARAMETERS = {"size": 5, "seed": 3}


def create(dataset: str, **parameters):
    from reasoning_gym import create_dataset  # takes seconds to import: only when these tests run

    return create_dataset(dataset, **parameters)


def score(response: str, metadata, **options) -> float:
    function = ReasoningGym(**options)
    function.prepare()
    tokens = array("i")
    return function.score(Sample("?", response, "?", metadata, tokens, False, "rg", "rg/0@0", 0))


def metadata(dataset: str, row: int = 0, **parameters):
    parameters = {**PARAMETERS, **parameters}
    entry = create(dataset, **parameters)[row]
    return {"dataset": dataset, "parameters": parameters, "entry": entry}


@pytest.mark.parametrize("dataset", ["chain_sum", "countdown", "spell_backward", "simple_equations"])
def test_right_answers_score_one_and_nonsense_less(dataset):
    given = metadata(dataset)
    assert score(f" {given['entry']['answer']}\n", given) == 1
    assert score("nonsense", given) < 0.5


def test_partial_credit_is_the_librarys_own():
    given = metadata("chain_sum")
    dataset = create("chain_sum", **PARAMETERS)
    response = f"it is {given['entry']['answer']}, I think"
    assert 0 < score(response, given) == dataset.score_answer(response, given["entry"]) < 1
    assert score(response, given, partial_credit=False) == 0
    assert score(given["entry"]["answer"], given, partial_credit=False) == 1


def test_the_answer_can_be_asked_for_in_a_tag():
    given = metadata("chain_sum")
    answer = given["entry"]["answer"]
    assert score(f"<answer>no</answer> or <answer> {answer}\n</answer>", given, tag="answer") == 1
    assert score(f"<answer>{answer}</answer> or <answer>no</answer>", given, tag="answer") < 0.1
    assert score(answer, given, tag="answer") == 0


def test_prompts_of_other_sources_are_refused():
    with pytest.raises(ValueError, match="not from a reasoning_gym source: its metadata has no 'dataset'"):
        score("1", {})
