"""One prompt from its samples to the buffer, or to the reason why it is dropped."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from rlsys.driver.books import Books
from rlsys.driver.generators import GeneratorPool, Request
from rlsys.driver.progress import Recorder
from rlsys.driver.rewarders import RewarderPool, Rounds
from rlsys.driver.waiting import gathered
from rlsys.driver.workers import WorkFailed
from rlsys.errors import BadRollout, HandleLost, SegmentError
from rlsys.ledger.ledger import Ledger
from rlsys.roles import Branch, Generated, Handle, Scored, TrainItem
from rlsys.segments import Strategy
from rlsys.types import GroupInfo, Prompt

logger = logging.getLogger(__name__)


class Production:
    """Takes prompts through generators and reward workers. Without a strategy they are sampled once."""

    def __init__(
        self,
        books: Books,
        generators: GeneratorPool,
        rewarders: RewarderPool,
        strategy: Strategy | None,
        recorder: Recorder,
    ) -> None:
        self._books = books
        self._generators = generators
        self._rewarders = rewarders
        self._strategy = strategy
        self._recorder = recorder

    @property
    def defers(self) -> bool:
        """Whether what a step does not finish goes on in later ones."""
        return self._strategy is not None and self._strategy.defers

    @property
    def _ledger(self) -> Ledger:
        return self._books.ledger

    def begin(self, prompts: Sequence[Prompt]) -> list[Coroutine[Any, Any, None]]:
        """Have prompts sampled; one coroutine each, which takes it to its end."""
        books, drawing = self._books, self._books.drawing
        if self._strategy is not None:
            prompts = [self._strategy.start(prompt) for prompt in prompts]
        books.start(prompts)
        self._recorder.sampling(len(prompts))
        for prompt in prompts:
            self._recorder.entered(prompt.id, "generation")
        self._recorder.traces.begin(prompts, books.batch)
        requests = [Request(prompt, drawing.sampling(prompt), training=True) for prompt in prompts]
        answers = self._generators.submit(requests)
        return [self._produce(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    async def _produce(self, prompt: Prompt, generating: Awaitable[Any]) -> None:
        """What is lost on the way with the node that had it, or refused by a reward worker, is sampled again."""
        refusals = 0
        while True:
            try:
                return await self._once(prompt, generating)
            except HandleLost as error:
                self._ledger.failed(prompt.id, "its node", str(error))
                logger.warning("%s is sampled again: %s", prompt.id, error)
            except BadRollout as error:
                refusals += 1
                self._ledger.failed(prompt.id, error.generator, str(error))
                self._recorder.refused(error.kind)
                if refusals >= self._generators.options.attempts:
                    return await self._books.drop(prompt, f"generation failed: {refusals} attempts, the last: {error}")
            self._recorder.sampling(1)
            self._recorder.entered(prompt.id, "generation")
            request = Request(prompt, self._books.drawing.sampling(prompt), training=True)
            [generating] = self._generators.submit([request])

    async def _once(self, prompt: Prompt, generating: Awaitable[Any]) -> None:
        books, traces = self._books, self._recorder.traces
        try:
            generated, _ = await generating
        except WorkFailed as error:
            return await books.drop(prompt, f"generation failed: {error}")
        finally:
            self._recorder.sampling(-1)
        info: GroupInfo = generated.info
        self._recorder.generated(info)
        self._ledger.sampled(info)
        traces.passed(prompt.id, "sampling", info.generator)
        try:
            rounds, later = await self._branch(prompt, generated)
            self._recorder.entered(prompt.id, "reward")
            if len(rounds) > 1:
                traces.passed(prompt.id, "branches", "generators")
            [scoring] = self._rewarders.submit([Rounds(prompt.id, rounds, training=True)])
            scored, rewarder = await scoring
        except SegmentError as error:
            return await books.drop(prompt, f"segments failed: {error}", info)
        except WorkFailed as error:
            return await books.drop(prompt, f"rewards failed: {error}", info)
        self._ledger.scored(scored.info, rewarder)
        self._recorder.entered(prompt.id, "after")
        traces.passed(prompt.id, "reward", rewarder)
        await books.keep(scored.payload)
        traces.passed(prompt.id, "disk", "driver")
        books.drawing.carry(prompt.index, later)
        await self.finish(prompt, scored)

    async def _branch(self, prompt: Prompt, generated: Generated) -> tuple[list[list[Handle]], Sequence[Branch]]:
        """Sample on from what there is, round by round, for as long as the strategy asks for more.

        Returns the rounds, and what is to go on in a later step.
        """
        strategy = self._strategy
        rounds = [[generated.payload]]
        while strategy is not None and (strategy.branches or strategy.defers):
            [asked] = self._rewarders.submit([Rounds(prompt.id, rounds, training=True, branch=True)])
            branches, _ = await asked
            if not branches:
                break
            if strategy.defers:
                return rounds, branches
            base = self._books.drawing.sampling(prompt)
            requests = [
                Request(b.prompt, replace(base, n=b.n, max_new_tokens=b.max_new_tokens), training=True, root=prompt.id)
                for b in branches
            ]
            self._recorder.sampling(len(requests))
            try:
                answers = await gathered(self._generators.submit(requests))
            finally:
                self._recorder.sampling(-len(requests))
            infos = [found.info for found, _ in answers]
            self._ledger.branched(prompt.id, len(infos), sum(info.sampled_tokens for info in infos))
            for info in infos:
                self._recorder.generated(info)
            rounds.append([found.payload for found, _ in answers])
        return rounds, ()

    async def finish(self, prompt: Prompt, scored: Scored) -> None:
        """A scored group that is on disk: filter it, let it wait for the reference and the learner."""
        if reason := self._books.reject(scored.info):
            return await self._books.drop(prompt, reason, scored.info, on_disk=True)
        self._books.finish(prompt, TrainItem(scored.info, scored.payload, None))
