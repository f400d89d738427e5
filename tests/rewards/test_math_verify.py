"""The math-verify reward: what counts as the answer of a response, and what it equals."""

from __future__ import annotations

import json
import re
from array import array
from pathlib import Path

import pytest

from rlsys.config.models import RewardsConfig
from rlsys.rewards import Sample
from rlsys.rewards.functions.math_verify import MathVerify

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module", autouse=True)
def prepared():
    MathVerify().prepare()


def score(response: str, answer: str | None, **options) -> float:
    tokens = array("i")
    sample = Sample("?", response, answer, {}, tokens, truncated=False, task="math", prompt_id="math/0@0", sample=0)
    return MathVerify(**options).score(sample)


def test_every_gsm8k_reference_answer_is_right_and_wrong_with_another_number():
    if not GSM8K.is_dir():
        pytest.skip("needs the GSM8K files (train.jsonl, test.jsonl) in ../shared/data/gsm8k")
    lines = [line for name in ("train", "test") for line in (GSM8K / f"{name}.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 8792
    not_right, not_wrong = [], []
    for i, answer in enumerate(answers):
        body, number = re.fullmatch(r"(.*)#### (-?[\d,]+)", answer, re.DOTALL).groups()
        value = int(number.replace(",", ""))
        # Each by one way of being off: by one, by a digit, by the sign.
        other = (value + 1, value * 10 + 1, -value - 1)[i % 3]
        if score(answer, answer) != 1:
            not_right.append(answer)
        if score(f"{body}#### {other}", answer) != 0:
            not_wrong.append(answer)
    assert (not_right, not_wrong) == ([], [])


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        # GSM8K style
        ("#### 72", "so it is 72\n#### 72"),
        ("so it is\n####72", "#### 72"),
        ("#### $1,234.", "#### 1,234"),
        ("#### 1234.00", "#### 1,234"),
        ("#### -5", "#### -5"),
        ("#### 9\nwait\n#### 10\n", "#### 10"),
        ("#### \\frac{144}{2}", "#### 72"),
        ("#### $72$", "#### 72"),
        (r"hence \boxed{72}", "#### 72"),
        (r"hence $\boxed{1{,}234}$", "#### 1,234"),
        (r"\boxed{71}, no, \boxed{72}", "72"),
        ("The answer is 72.", "#### 72"),
        ("3 + 4 = 7, so 7 dollars in all", "#### 7"),
        # LaTeX references
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\dfrac12}", r"$\frac{1}{2}$"),
        (r"The answer is $\frac{2}{4}$.", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{(x+1)^2}", "x^2 + 2x + 1"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{[1, 2)}", "[1,2)"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{50\%}", "50%"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{\text{(C)}}", "C"),
    ],
)
def test_right(response, answer):
    assert score(response, answer) == 1


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "72"),
        ("seventy-two", "72"),
        ("#### ", "72"),
        ("####", "72"),
        ("#### 7", "72"),
        ("#### 720", "72"),
        ("#### 72.5", "72"),
        ("#### -72", "72"),
        ("#### 72 or 73", "73"),
        ("#### 72, 73", "73"),
        ("#### 72 73", "73"),
        ("#### 72\n73", "73"),
        # What the response says in its best format counts, not the right number somewhere else.
        ("#### 71\nThe answer is 72", "72"),
        (r"\boxed{71} or rather 72", "72"),
        (r"\boxed{72}, no, \boxed{71}", "72"),
        (r"\boxed{71, 72}", "72"),
        (r"\boxed{}", "72"),
        (r"The answer is $\frac{1}{2}$.", "2"),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}"),
        (r"\boxed{0.33}", r"\frac{1}{3}"),
        (r"\boxed{[1, 2]}", "[1,2)"),
        (r"\boxed{x^2 + 1}", "x^2 + 2x + 1"),
        (r"\boxed{\text{(D)}}", "C"),
        (r"\boxed{" + "1+" * 1000 + "1}", "1001"),  # no answer to a question is that long
        (r"\boxed{\frac{7", "7"),
    ],
)
def test_wrong(response, answer):
    assert score(response, answer) == 0


def test_formats_that_are_not_asked_for_do_not_count():
    assert score("The answer is 72", "72") == 1
    assert score("The answer is 72", "72", extract=("hash", "boxed")) == 0
    assert score(r"\boxed{72}", "72", extract=("hash",)) == 0
    assert score("#### 72", "72", extract=("boxed",)) == 0
    assert score("I counted 70, then 1,072 sheep.", "1072", extract=("last_number",)) == 1
    assert score("I counted 1,072 sheep, then 70.", "1072", extract=("last_number",)) == 0
    assert score("x72", "72", extract=("last_number",)) == 0


@pytest.mark.parametrize("answer", ["", "#### ", r"\frac{1}{", "#### n/a?"])
def test_a_reference_that_cannot_be_parsed_is_an_error_and_not_a_zero(answer):
    with pytest.raises(ValueError, match=r"reference answer .* is neither a number nor LaTeX"):
        score("#### 1", answer)


def test_a_missing_reference_is_an_error():
    with pytest.raises(ValueError, match="no reference answer"):
        score("#### 1", None)


@pytest.mark.slow  # imports the library in two processes
async def test_in_a_worker_an_endless_comparison_is_a_timeout(group, start_worker):
    """The library would call it "not equal" after its own time-out."""
    functions = [{"name": "math", "kind": "math_verify"}]
    worker = await start_worker(RewardsConfig.model_validate({"functions": functions, "timeout_s": 1.5}))
    scored = await worker.score(group("#### 3", r"\boxed{9^{9^{9}}}", r"\boxed{4}", answer="3"))
    assert [r.status for r in scored.rewards] == ["ok", "timeout", "ok"]
    assert [r.score for r in scored.rewards if r.status == "ok"] == [1.0, 0.0]
