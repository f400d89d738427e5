"""Prompts: what the policy is asked, in a seeded order that resumes exactly.

    PromptSource.row(i) -> RawPrompt -> encode -> PromptStream.draw(index) -> Prompt

A source is rows by number; there is one per file (`sums`, `jsonl`, `huggingface`, `reasoning_gym`), and
`sources.open_source` opens the one that a config names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant" | "tool", "content": text}


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """One row, before it is turned into tokens."""

    content: str | Sequence[Message]
    answer: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    demonstration: str | None = None  # a good response


class PromptSource(Protocol):
    """Rows by number: `row(i)` is always the same one."""

    name: str  # short, for prompt ids
    task: str
    generated: bool  # rows come from a program, not from a file that a user may have got wrong

    @property
    def size(self) -> int | None:
        """Rows; None: endless."""
        ...

    def row(self, i: int) -> RawPrompt:
        """Row `i`, from 0. Raises DataError when it is malformed."""
        ...

    def where(self, i: int) -> str:
        """Where row `i` stands, for messages: "train.jsonl line 17"."""
        ...
