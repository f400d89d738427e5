"""Prompts in a seeded order that resumes exactly: every draw is a function of its index alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys.config.models import PromptsConfig
from rlsys.config.models import PromptSource as SourceConfig
from rlsys.errors import DataError
from rlsys.prompts import PromptSource
from rlsys.prompts.encoding import Encoder, TooLong
from rlsys.prompts.sources import open_source
from rlsys.registry import nearest
from rlsys.types import Demonstration, Prompt


class PromptStream:
    """The prompts of a run, by index.

    Of a finite source, each epoch is a permutation of its usable rows, computed from seed and epoch; row r of epoch e
    has the id `"name/r@e"`. An endless source is drawn in its own order, all in epoch 0. There is no state besides
    the index: `draw(index)` gives the same prompt in any process, whatever was drawn before.
    """

    def __init__(
        self, source: PromptSource, encoder: Encoder, seed: int, shuffle: bool = True, skip_too_long: bool = False
    ) -> None:
        """Checks every row of a source that was read from files. Raises DataError for the first bad one."""
        self._source = source
        self._encoder = encoder
        self._seed = seed
        self._shuffle = shuffle
        self.skipped = 0  # rows left out as too long
        self._rows: np.ndarray | None = None  # usable ones, int64; None: all of them
        if source.size == 0:
            raise DataError(f"{source.name}: holds no prompts")
        if source.size is not None and (skip_too_long or not source.generated):
            self._check_rows(source.size, skip_too_long)
        self._order = lru_cache(maxsize=2)(self._compute_order)

    @classmethod
    def from_config(
        cls,
        source: SourceConfig,
        prompts: PromptsConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        seed: int,
    ) -> PromptStream:
        """`max_prompt_tokens` is model.max_length - rollout.max_new_tokens. Raises DataError and ConfigError."""
        encoder = Encoder(prompts, tokenizer, max_prompt_tokens)
        return cls(open_source(source), encoder, seed, prompts.shuffle, prompts.too_long == "skip")

    @property
    def size(self) -> int | None:
        """Prompts in an epoch; None: endless."""
        return self._source.size if self._rows is None else len(self._rows)

    def at(self, place: int) -> tuple[int, str]:
        """Row and epoch at `place` (0, 1, 2, ...) of the order."""
        size = self.size
        if size is None:
            return place, "0"
        epoch, place = divmod(place, size)
        return int(self._order(epoch)[place]), str(epoch)

    def attribute(self, row: int, key: str) -> Any:
        """What the row's metadata have under the key. Raises DataError when they have nothing."""
        metadata = self._source.row(row).metadata
        if key not in metadata:
            raise DataError(
                f"{self._source.where(row)}: no {key!r} in its metadata{nearest(key, list(metadata))}, which the "
                f"curriculum goes by; it has {', '.join(map(repr, metadata)) or 'none'} (set metadata_keys)"
            )
        return metadata[key]

    def draw(self, index: int, row: int | None = None, epoch: str = "") -> Prompt:
        """The prompt at place `index` of the order, or draw number `index` of a row that a curriculum has chosen.

        Raises DataError, for generated rows only.
        """
        if row is None:
            row, epoch = self.at(index)
        return self._prompt(index, row, epoch)

    def distinct(self, count: int) -> list[Prompt]:
        """The first `count` prompts of the order with different tokens, or as many as there are.

        Their epoch is called "eval", so that they share no id with prompts that are trained on.
        """
        found: list[Prompt] = []
        seen: set[bytes] = set()
        # An endless source may have fewer different prompts than asked for: stop looking some time.
        tries = self.size if self.size is not None else 10 * count + 1000
        for place in range(tries):
            if len(found) == count:
                break
            row = place if self.size is None else int(self._order(0)[place])
            prompt = self._prompt(len(found), row, epoch="eval")
            if prompt.token_ids.tobytes() not in seen:
                seen.add(prompt.token_ids.tobytes())
                found.append(prompt)
        return found

    def _prompt(self, index: int, row: int, epoch: str) -> Prompt:
        raw = self._source.row(row)
        where = self._source.where(row)
        encoded = self._encoder.encode(raw, where)
        demonstration = None
        if raw.demonstration is not None:
            demonstration = Demonstration(raw.demonstration, self._encoder.response(raw.demonstration, where))
        return Prompt(
            id=f"{self._source.name}/{row}@{epoch}",
            index=index,
            token_ids=encoded.token_ids,
            text=encoded.text,
            task=self._source.task,
            answer=raw.answer,
            # Below 2**62: a rollout's own seed, some more, still fits 64 bits with a sign.
            seed=stable_hash("sampling", self._seed, epoch == "eval", index) >> 2,
            metadata=raw.metadata,
            demonstration=demonstration,
        )

    def _compute_order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in order, int64 [size]."""
        size = self.size
        assert size is not None
        rows = np.arange(size) if self._rows is None else self._rows
        if not self._shuffle:
            return rows
        # RandomState, because NumPy promises that its streams never change; a resume may come with a newer NumPy.
        key = stable_hash("order", self._seed, epoch)
        return rows[np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).permutation(size)]

    def _check_rows(self, size: int, skip_too_long: bool) -> None:
        usable = []
        for row in range(size):
            try:
                self._encoder.check(self._source.row(row), self._source.where(row))
            except TooLong:
                if not skip_too_long:
                    raise
            else:
                usable.append(row)
        if not usable:
            raise DataError(f"{self._source.name}: every one of its {size} prompts is too long")
        self.skipped = size - len(usable)
        if self.skipped:
            self._rows = np.array(usable, dtype=np.int64)


def eval_prompts(
    source: SourceConfig,
    prompts: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    seed: int,
    count: int,
) -> Sequence[Prompt]:
    """Held-out prompts: the first `count` different ones of the seeded order, fewer if there are no more."""
    return PromptStream.from_config(source, prompts, tokenizer, max_prompt_tokens, seed).distinct(count)


def stable_hash(*parts: object) -> int:
    """64 bits that depend on the parts alone, not on the process or the version of anything."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
