"""Which prompt is drawn next: the curriculum's choices, and what it learns of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from rlsys.curricula import Choice, Curriculum, Rows, Seen
from rlsys.driver.recovery import Plan
from rlsys.roles import PromptReport, Sampling, StepReport
from rlsys.types import GroupInfo, Progress, Prompt


class PromptStream(Rows, Protocol):
    def draw(self, index: int, row: int | None = None, epoch: str = "") -> Prompt:
        """Draw number `index` of the run, which is of that row and epoch; the same prompt at every call."""
        ...


class Drawing:
    """Prompts by index: those that have to be drawn again first, then new ones as the curriculum chooses."""

    def __init__(self, prompts: PromptStream, curriculum: Curriculum, sampling: Sampling, seed: int) -> None:
        self.next_index = 0
        self.curriculum = curriculum
        self._prompts = prompts
        self._sampling = sampling
        self._redraw: deque[int] = deque()
        self._choices: dict[int, Choice] = {}  # of prompts without a fate
        self._seen: list[Seen] = []  # since the last step
        curriculum.bind(prompts, seed, sampling.n)

    def resume(self, plan: Plan, memory: Mapping[str, Any]) -> None:
        """Go on as a run was recovered; `memory` is the curriculum's in the checkpoint."""
        self._redraw, self.next_index = deque(plan.redraw), plan.next_index
        self._choices = {index: Choice(**choice) for index, choice in plan.choices.items()}
        if memory:
            self.curriculum.load_state_dict(memory)

    def candidates(self, count: int) -> list[Prompt]:
        """Prompts that the next new draws may be of, for the critic to judge; none where nobody asks for that."""
        rows = self.curriculum.candidates(range(self.next_index, self.next_index + count))
        return [self._prompts.draw(i, row, "candidate") for i, row in enumerate(rows)]

    def judged(self, count: int, values: Sequence[float]) -> None:
        """What the critic says of `candidates(count)`."""
        rows = self.curriculum.candidates(range(self.next_index, self.next_index + count))
        self.curriculum.judged(dict(zip(rows, values, strict=True)))

    def draw(self, count: int, progress: Progress) -> list[Prompt]:
        again = [self._redraw.popleft() for _ in range(min(count, len(self._redraw)))]
        new = range(self.next_index, self.next_index + count - len(again))
        self.next_index = new.stop
        if new:
            self._choices |= zip(new, self.curriculum.choose(new, progress), strict=True)
        return [self.again(index) for index in (*again, *new)]

    def again(self, index: int) -> Prompt:
        """The prompt of a draw that has no fate yet."""
        choice = self._choices[index]
        return self._prompts.draw(index, choice.row, choice.epoch)

    def choice(self, index: int) -> dict[str, Any]:
        """What the ledger is to know of it."""
        return {key: value for key, value in asdict(self._choices[index]).items() if value is not None}

    def sampling(self, index: int) -> Sampling:
        choice = self._choices[index]
        sampling = self._sampling if choice.samples is None else replace(self._sampling, n=choice.samples)
        if choice.temperature is None:
            return sampling
        hotter = choice.temperature > sampling.temperature
        return replace(sampling, temperature=choice.temperature, origin="hotter" if hotter else "colder")

    def ended(self, index: int, info: GroupInfo | None, report: PromptReport | None = None) -> None:
        """The prompt has its fate; without an info it was never scored, without a report not trained."""
        choice = self._choices.pop(index)
        if info is not None and info.scores:
            advantage, value = (None, None) if report is None else report
            self._seen.append(Seen(choice, info, advantage, value))

    def observe(self, report: StepReport, infos: Sequence[GroupInfo], metrics: Mapping[str, float]) -> dict[str, float]:
        """A step was taken on these groups: tell the curriculum. Returns what it has to log."""
        for info in infos:
            self.ended(info.index, info, report.prompts.get(info.prompt_id))
        seen, self._seen = sorted(self._seen, key=lambda seen: seen.info.index), []
        return self.curriculum.observe(seen, metrics)
