"""A few prompts of each step are followed through the loop: one id, from its sampling to the gradient.

    sampling > (branches) > reward > disk > (reference) > queue > batch > gradient

Each stage begins where the one before ended, so whatever a prompt waited for is in the stage that it waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rlsys.types import GroupInfo, Prompt

PROMPTS_PER_STEP = 4


class Traces:
    """`emit(stage, start, end, lane, prompt id)` is called at the end of each stage; `now` is its clock."""

    def __init__(self, emit: Callable[[str, float, float, str, str], None], now: Callable[[], float]) -> None:
        self._emit = emit
        self._now = now
        self._since: dict[str, float] = {}  # of the prompts that are followed: when their stage began

    def begin(self, prompts: Iterable[Prompt], batch: int) -> None:
        """These prompts are to be sampled; every so many of a batch is followed."""
        stride = max(1, batch // PROMPTS_PER_STEP)
        self._since |= {prompt.id: self._now() for prompt in prompts if prompt.index % stride == 0}

    def passed(self, prompt_id: str, stage: str, lane: str, at: float | None = None) -> None:
        """The prompt is through with a stage, at `lane`."""
        if (started := self._since.get(prompt_id)) is not None:
            ended = max(started, self._now() if at is None else at)
            self._emit(stage, started, ended, lane, prompt_id)
            self._since[prompt_id] = ended

    def trained(self, infos: Iterable[GroupInfo], figures: Mapping[str, float]) -> None:
        """A step on these groups has ended; its figures say how much of it was the update, after building the batch."""
        ended = self._now()
        built = ended - figures["learner/update_s"] if "learner/update_s" in figures else None
        for info in infos:
            if built is not None:
                self.passed(info.prompt_id, "batch", "learner", built)
            self.passed(info.prompt_id, "gradient", "learner", ended)
            self.end(info.prompt_id)

    def end(self, prompt_id: str) -> None:
        """It has its fate."""
        self._since.pop(prompt_id, None)
