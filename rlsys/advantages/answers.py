"""Final answers of responses, for rules that ask how far the responses of a group agree."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = r"-?\d+(?:\.\d+)?"  # the last number of the text


def final_answers(texts: Sequence[str], pattern: str) -> list[str]:
    """The last match of `pattern` in each text (its first group where it has one); "" where there is none."""
    compiled = re.compile(pattern, re.DOTALL)
    answers = []
    for text in texts:
        found = compiled.findall(text)
        last = found[-1] if found else ""
        answers.append(last if isinstance(last, str) else last[0])
    return answers
