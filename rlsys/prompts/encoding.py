"""From a raw prompt to tokens: instruction, system prompt, chat template, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys.config.models import PromptsConfig
from rlsys.errors import ConfigError, DataError
from rlsys.prompts import Message, RawPrompt

_SPECIAL_TOKENS = 16  # more than any tokenizer adds to a text


class TooLong(DataError):
    """The prompt leaves no room for the response."""


@dataclass(frozen=True, slots=True)
class Encoded:
    text: str  # what the tokens say
    token_ids: np.ndarray  # int32 [P]


class Encoder:
    """Turns raw prompts into tokens, as the `prompts` section of a config says.

    With a chat template, text becomes one user message; without, the text is taken as it is, and the tokenizer adds the
    special tokens that it adds to any text. `max_tokens` is what a prompt may have at most.
    """

    def __init__(self, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if max_tokens <= 0:
            raise ConfigError("model.max_length: rollout.max_new_tokens leaves no room for a prompt")
        self._tokenizer = tokenizer
        self._template = _uses_template(config.chat_template, tokenizer)
        self._system_prompt = config.system_prompt
        self._instruction = config.instruction
        self._max_tokens = max_tokens
        if config.system_prompt is not None and not self._template:
            raise ConfigError(
                "prompts.system_prompt: needs a chat template; put it into the prompts, or use `instruction`"
            )

    def check(self, raw: RawPrompt, where: str) -> None:
        """Raise what `encode` would raise, without tokenising a text too short to have too many tokens."""
        text = self._text(raw, where)
        if len(text.encode()) > self._max_tokens - _SPECIAL_TOKENS:  # a token of text is a byte at least
            self.encode(raw, where)

    def encode(self, raw: RawPrompt, where: str) -> Encoded:
        """Raises DataError naming `where`, and TooLong (a DataError) for a prompt of too many tokens."""
        text = self._text(raw, where)
        # A chat template writes the special tokens itself.
        ids = self._tokenizer(text, add_special_tokens=not self._template, verbose=False)["input_ids"]
        if len(ids) > self._max_tokens:
            raise TooLong(
                f"{where}: the prompt has {len(ids)} tokens, and model.max_length - rollout.max_new_tokens leaves "
                f"{self._max_tokens}; raise model.max_length, or set prompts.too_long: skip"
            )
        return Encoded(text, np.array(ids, dtype=np.int32))

    def response(self, text: str, where: str) -> np.ndarray:
        """Tokens of a demonstration, int32 [T], with the end of sequence. Raises DataError."""
        end = self._tokenizer.eos_token_id
        if end is None:
            raise DataError(f"{where}: a demonstration needs a tokenizer with an end-of-sequence token")
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array([*ids, end], dtype=np.int32)

    def _text(self, raw: RawPrompt, where: str) -> str:
        text = self._rendered(raw, where)
        if not text.strip():
            raise DataError(f"{where}: the prompt is empty")
        return text

    def _rendered(self, raw: RawPrompt, where: str) -> str:
        if not self._template:
            if not isinstance(raw.content, str):
                raise DataError(
                    f"{where}: chat messages need a chat template, and the tokenizer has none or prompts.chat_template "
                    "is never"
                )
            return self._instructed(raw.content)
        messages = [{"role": "user", "content": raw.content}] if isinstance(raw.content, str) else list(raw.content)
        rendered = self._tokenizer.apply_chat_template(
            self._completed(messages, where), tokenize=False, add_generation_prompt=True
        )
        assert isinstance(rendered, str)
        return rendered

    def _completed(self, messages: Sequence[Message], where: str) -> list[dict[str, str]]:
        """With the system prompt in front and the instruction in the last message."""
        *before, last = messages
        if last["role"] not in ("user", "tool"):
            raise DataError(f"{where}: the last message is of role {last['role']!r}: there is nothing to respond to")
        completed = [dict(message) for message in before]
        completed.append({**last, "content": self._instructed(last["content"])})
        if self._system_prompt is not None and completed[0]["role"] != "system":
            completed.insert(0, {"role": "system", "content": self._system_prompt})
        return completed

    def _instructed(self, text: str) -> str:
        return text if self._instruction is None else f"{text}\n{self._instruction}"


def _uses_template(setting: Literal["auto", "always", "never"], tokenizer: PreTrainedTokenizerBase) -> bool:
    has_one = bool(tokenizer.chat_template)
    if setting == "always" and not has_one:
        raise ConfigError("prompts.chat_template: always, but the tokenizer has no chat template")
    return has_one and setting != "never"
