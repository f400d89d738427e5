"""Which prompt is drawn next: the curriculum's choices, and what it learns of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np

from rlsys.curricula import Choice, Curriculum, Rows, Seen, runs
from rlsys.driver.recovery import Plan
from rlsys.roles import Branch, PromptReport, Sampling, StepReport
from rlsys.segments import with_prefix
from rlsys.types import GroupInfo, Progress, Prompt


class PromptStream(Rows, Protocol):
    def draw(self, index: int, row: int | None = None, epoch: str = "") -> Prompt:
        """Draw number `index` of the run, which is of that row and epoch; the same prompt at every call."""
        ...


class Drawing:
    """Prompts by index: first those to be drawn again, then responses that were begun in an earlier step, then
    new ones as the curriculum chooses.
    """

    def __init__(self, prompts: PromptStream, curriculum: Curriculum, sampling: Sampling, seed: int) -> None:
        self.next_index = 0
        self.curriculum = curriculum
        self._prompts = prompts
        self._sampling = sampling
        self._redraw: deque[int] = deque()
        self._carried: list[tuple[int, Choice]] = []  # responses that are to go on, and the draw that began them
        self._known: set[tuple[int, str]] = set()  # row and epoch of draws without a fate of an earlier process
        self._choices: dict[int, Choice] = {}  # of prompts without a fate
        self._seen: list[Seen] = []  # since the last step
        curriculum.bind(prompts, seed, sampling.n)

    def state_dict(self) -> dict[str, Any]:
        carried = [[index, _plain(choice)] for index, choice in self._carried]
        return {"curriculum": self.curriculum.state_dict(), "carried": carried}

    def resume(self, plan: Plan, memory: Mapping[str, Any]) -> None:
        """Go on as a run was recovered; `memory` is what `state_dict` gave for the checkpoint."""
        self._redraw, self.next_index = deque(plan.redraw), plan.next_index
        self._choices = {index: _choice(choice) for index, choice in plan.choices.items()}
        self._known = {(choice.row, choice.epoch) for choice in self._choices.values()}
        if memory:
            self.curriculum.load_state_dict(memory["curriculum"])
            carried = [(index, _choice(plain)) for index, plain in memory["carried"]]
            # Not those that were drawn since, nor what is begun anew.
            self._carried = [
                (index, choice)
                for index, choice in carried
                if (choice.row, choice.epoch) not in self._known and index not in plan.redraw
            ]

    def carry(self, index: int, branches: Sequence[Branch]) -> None:
        """Have what draw `index` has begun go on in later draws, before new prompts.

        What goes on in a draw that an earlier process made is drawn again as it was, and not a second time.
        """
        choice = self._choices[index]
        for branch in branches:
            prompt = branch.prompt
            prefix = prompt.token_ids[len(prompt.token_ids) - prompt.prefix_tokens :]
            sample = prompt.id.rpartition("/")[2]
            goes_on = replace(
                choice,
                epoch=f"{choice.epoch}/{sample}",
                samples=branch.n,
                prefix=tuple(prefix.tolist()),
                max_new_tokens=branch.max_new_tokens,
            )
            if (goes_on.row, goes_on.epoch) not in self._known:
                self._carried.append((index, goes_on))
        self._carried.sort(key=lambda entry: (entry[0], entry[1].epoch))  # not by who was ready first

    def candidates(self, count: int) -> dict[int, Prompt]:
        """Rows that the next draws may be of, as prompts for the critic to judge.

        Also for those to be drawn again: what is drawn in place of a dropped one is chosen by the same values then as
        in a run without an interruption.
        """
        again = list(self._redraw)[:count]
        indices = [*again, *range(self.next_index, self.next_index + count - len(again))]
        rows = dict.fromkeys(row for run in runs(indices) for row in self.curriculum.candidates(run))
        return {row: self._prompts.draw(i, row, "candidate") for i, row in enumerate(rows)}

    def draw(self, count: int, progress: Progress) -> list[Prompt]:
        again = [self._redraw.popleft() for _ in range(min(count, len(self._redraw)))]
        going_on = range(self.next_index, self.next_index + min(count - len(again), len(self._carried)))
        self._choices |= {index: self._carried.pop(0)[1] for index in going_on}
        new = range(going_on.stop, self.next_index + count - len(again))
        self.next_index = new.stop
        if new:
            self._choices |= zip(new, self.curriculum.choose(new, progress), strict=True)
        return [self.again(index) for index in (*again, *going_on, *new)]

    def again(self, index: int) -> Prompt:
        """The prompt of a draw that has no fate yet."""
        choice = self._choices[index]
        prompt = self._prompts.draw(index, choice.row, choice.epoch)
        return with_prefix(prompt, np.array(choice.prefix, np.int32)) if choice.prefix else prompt

    def choice(self, index: int) -> dict[str, Any]:
        """What the ledger is to know of it."""
        return _plain(self._choices[index])

    def sampling(self, prompt: Prompt) -> Sampling:
        """How a drawn prompt is sampled; what it has of the response already is not sampled again."""
        choice = self._choices[prompt.index]
        sampling = self._sampling if choice.samples is None else replace(self._sampling, n=choice.samples)
        if choice.max_new_tokens is not None:
            sampling = replace(sampling, max_new_tokens=choice.max_new_tokens)
        elif prompt.prefix_tokens:
            sampling = replace(sampling, max_new_tokens=sampling.max_new_tokens - prompt.prefix_tokens)
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


def _plain(choice: Choice) -> dict[str, Any]:
    """For JSON, without what is as ever."""
    return {key: value for key, value in asdict(choice).items() if value is not None and value != ()}


def _choice(plain: Mapping[str, Any]) -> Choice:
    return Choice(**{**plain, "prefix": tuple(plain.get("prefix", ()))})
