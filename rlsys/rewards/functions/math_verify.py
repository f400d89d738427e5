"""Mathematical equivalence by the math-verify library (https://github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from rlsys.rewards import RewardFunction, Sample

Format = Literal["hash", "boxed", "last_number", "anywhere"]

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
_PLAIN = re.compile(rf"\s*[$€£¥]?\s*(?P<number>{_NUMBER})\s*(?P<percent>\\?%)?\s*\.?\s*")
_LAST_NUMBER = re.compile(rf"(?<![\w.,])(?:{_NUMBER})(?![\w])")
_DELIMITED = re.compile(r"\\boxed|\$|\\\(|\\\[")

# Where the library's own search looks: an answer stands at the end, and its patterns are slow on long texts.
_TAIL = 2000
# Longer "answers" are no answers, and slow to parse.
_LONGEST = 500


@dataclass(frozen=True)
class MathVerify(RewardFunction):
    r"""1 when the response's answer equals the reference mathematically, else 0.

    The reference is what follows `####` in the row's answer (GSM8K), or else the whole of it, as a number or LaTeX.
    One that cannot be parsed is an error, not a zero.

    The response's answer is read in the first of the formats of `extract` that the response uses; what it says there
    counts, right or wrong, so that a second guess elsewhere earns nothing:

    - `hash`: the rest of the line after the last `####`
    - `boxed`: the last `\boxed{...}`
    - `last_number`: the last number of the text
    - `anywhere`: what math-verify finds in the last 2,000 characters ("the answer is ...", then the last LaTeX or
      number)

    `hash` and `boxed` alone are the strictest: the other two credit a response that merely ends with the right number.
    Numbers are compared to 6 decimals; `50%` equals both `0.5` and `50` (rules of the library).
    """

    name: ClassVar[str] = "math_verify"

    extract: tuple[Format, ...] = ("hash", "boxed", "anywhere")

    def prepare(self) -> None:
        import math_verify  # noqa: F401  (seconds to import: now rather than at the first sample)

        # The library times itself out with SIGALRM and then answers "not equal". Its time-outs are off (None below),
        # the worker's own replace them; the library warns about that once per process.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def score(self, sample: Sample) -> float:
        from math_verify import verify

        if sample.answer is None:
            raise ValueError("the prompt has no reference answer")
        gold = parse_reference(sample.answer)
        for format_ in self.extract:
            found = _FORMATS[format_](sample.response)
            if found is not None:
                return float(bool(found) and verify(gold, found, timeout_seconds=None))
        return 0.0


@lru_cache(maxsize=4096)
def parse_reference(answer: str) -> list[Any]:
    """SymPy expressions of a reference answer. Raises ValueError when there are none."""
    text = answer.rpartition("####")[2].strip()
    gold = _parse(text) if _DELIMITED.search(text) else _parse_content(text)
    if not gold:
        raise ValueError(f"the reference answer {text[:80]!r} is neither a number nor LaTeX that math-verify can parse")
    return gold


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # No fallback to comparing strings: what cannot be parsed equals nothing.
    return parse(text, fallback_mode="no_fallback", parsing_timeout=None)


def _parse_content(content: str) -> list[Any]:
    """Parse the whole of `content`, never just a part of it: `72 or 73` is not 73."""
    from sympy import Integer

    if len(content) > _LONGEST:
        return []
    plain = _PLAIN.fullmatch(content)
    if plain:
        number = plain["number"].replace(",", "").lstrip("+")
        if not plain["percent"] and "." not in number:
            return [Integer(int(number))]  # as the library reads it, thirty times as fast
        return _parse(number + ("%" if plain["percent"] else ""))
    return _parse(f"\\boxed{{{content}}}")


def _hash(response: str) -> list[Any] | None:
    _, marker, rest = response.rpartition("####")
    if not marker:
        return None
    line = rest.strip().partition("\n")[0].strip()
    delimited = re.fullmatch(r"\$(.+)\$\.?|\\\((.+)\\\)\.?", line)
    return _parse_content((delimited[1] or delimited[2]) if delimited else line)


def _boxed(response: str) -> list[Any] | None:
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    first = start + len("\\boxed{")
    for i in range(first - 1, len(response)):
        depth += {"{": 1, "}": -1}.get(response[i], 0)
        if depth == 0:
            return _parse_content(response[first:i])
    return None  # never closed: cut off


def _last_number(response: str) -> list[Any] | None:
    numbers = _LAST_NUMBER.findall(response)
    return _parse_content(numbers[-1]) if numbers else None


def _anywhere(response: str) -> list[Any] | None:
    return _parse(response[-_TAIL:])


_FORMATS: dict[Format, Callable[[str], list[Any] | None]] = {
    "hash": _hash,
    "boxed": _boxed,
    "last_number": _last_number,
    "anywhere": _anywhere,
}
