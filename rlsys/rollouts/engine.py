"""A rollout generator around one vLLM engine.

Log-probs. `behavior_logprobs` are those of the distribution a token was drawn from: `log_softmax(logits /
temperature)`, and where top-p or top-k cut that distribution, of what was left of it, renormalised. With a cut they
are the true behaviour policy but differ from a learner's log-probs, which know no cut; use neither where importance
ratios matter. Greedy sampling (temperature 0) reports log-probs at temperature 1.

Weight updates. Generation pauses, running requests keep their tokens, and go on under the new weights. With
`weights.kv_cache: recompute` their cache is computed again, so every token's log-prob is exactly its version's; with
`keep` the running ones go on with what the old weights left in the cache, and their later tokens are only
approximately their version's. Requests that start after an update see no older states in either case: prefix caching is
salted with the version. With `share` they do, as far as their prompts begin like earlier ones, and a group says of how
many of its prompt's tokens (`RolloutGroup.old_states`); nothing is ever computed again for an update.

Determinism. A call of `generate` into an idle engine is submitted as a whole before the first of it is scheduled,
with empty caches (but with `share`). What comes out then depends on the weights, the prompts and the sampling alone, to
the last bit (same machine, same settings). Two limits: a call into a busy engine joins running batches, whose
composition moves floating-point rounding; and stop *strings* are found outside of the engine process, some steps late,
which moves the composition as well.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlsys.config.models import Config
from rlsys.errors import DataError, EngineError, ModelMismatchError, WeightUpdateError, WorkerDied
from rlsys.roles import Probe, PublishedWeights, Sampling, UpdateReport
from rlsys.rollouts.convert import requests, sampling_params, to_group
from rlsys.rollouts.probe import check_probe
from rlsys.rollouts.settings import engine_args, prepare_environment
from rlsys.rollouts.transfer import transfer
from rlsys.types import Prompt, RolloutGroup, group_info
from rlsys.weights.expected import ExpectedTensors

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

_ENDED = "its vLLM engine process ended"
PROBE_PRIORITY = -1  # before every prompt, whose priorities are 0, 1, 2, ...


class VllmGenerator:
    """One engine: `AsyncLLM` in this process, the model in a child process of it.

    Call everything from one event loop. `start` and `close` block that loop for seconds. After a failure which leaves
    the weights in doubt, the engine is ended, and every running and later call raises WorkerDied.
    """

    def __init__(self, name: str, config: Config, model_path: str | Path, version: int = 0) -> None:
        """`version` is what the weights in `model_path` are labelled with until the first update."""
        self.name = name
        self.version = version
        self.vocabulary = 0  # the model's, once it is loaded
        self._config = config
        self._model_path = model_path
        self._engine: AsyncLLM | None = None
        self._gone: str | None = None  # why the engine is of no use any more
        self._scheduling = asyncio.Lock()  # held by whoever pauses and resumes
        self._updating = asyncio.Lock()
        self._aborting: set[asyncio.Task[None]] = set()  # the event loop keeps no reference to its tasks
        self._shared = config.weights.kv_cache == "share"
        self._first_seen: dict[int, int] = {}  # hash of a prompt's first cache block -> version; with `share` alone
        self._requests = 0
        self._tokens = 0
        self._transfer = transfer(name, config)
        self._agreed = False  # with the learner, about a probe

    async def start(self) -> None:
        """Start the engine process, load the model, generate a little (a first request has one-off work to do).

        Changes the environment variables of this process, from which the child takes its own. Raises ConfigError for
        `rollout.engine.extra`, EngineError when the engine does not start.
        """
        prepare_environment(self._config, os.environ)
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_args(self._config, self._model_path)
        try:
            self._expected = ExpectedTensors.of(self._model_path)
            self._engine = AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError, OSError) as error:
            # What happened in the engine process is in the output of that process; vLLM says no more than that it
            # failed.
            raise EngineError(f"{self.name}: vLLM does not start with {self._model_path}: {error}") from error
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self._count_tokens(self._engine)
        with self._failures():
            await self._engine.update_weight_version(str(self.version))
        warm_up = Prompt("warm-up", -1, np.zeros(4, dtype=np.int32), "", "", None, seed=0)
        for group in await self.generate([warm_up], Sampling(n=4, max_new_tokens=4, ignore_eos=True)):
            await group
        self._tokens = 0

    # ---- sampling -----------------------------------------------------------------------------------------------

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Awaitable[RolloutGroup]]:
        """Start sampling `sampling.n` rollouts of each prompt, sample i seeded with `prompt.seed + i`.

        Returns one awaitable per prompt, in order; cancelling one ends its requests. Raises DataError for a prompt
        that leaves no room for a response; an awaitable raises WorkerDied when the engine ends, EngineError when vLLM
        gives up on it.
        """
        room = self._config.model.max_length
        for prompt in prompts:
            if not 0 < len(prompt.token_ids) < room:
                raise DataError(
                    f"prompt {prompt.id} has {len(prompt.token_ids)} tokens; with model.max_length={room} "
                    f"it may have 1 to {room - 1}"
                )
            if sampling.expert and prompt.demonstration is not None:
                whole = len(prompt.token_ids) + len(prompt.demonstration.token_ids)
                if whole > room:
                    raise DataError(
                        f"prompt {prompt.id} and its demonstration have {whole} tokens; model.max_length is {room}"
                    )
        queues: list[list[RequestOutputCollector]] = []
        async with self._scheduling:
            engine = self._running_engine()
            idle = engine.get_num_unfinished_requests() == 0
            with self._failures():
                if idle:
                    await self._pause(clear_cache=not self._shared)
                try:
                    for prompt in prompts:
                        queues.append([])
                        for request in requests(sampling):
                            queues[-1].append(await self._submit(prompt, request))
                except BaseException:
                    await engine.abort([queue.request_id for own in queues for queue in own], internal=True)
                    raise
                finally:
                    if idle:
                        await self._resume()
        answers: list[Awaitable[RolloutGroup]] = []
        for prompt, own in zip(prompts, queues, strict=True):
            task = asyncio.create_task(self._collect(prompt, sampling, own), name=prompt.id)
            # Not in the task itself: one that is cancelled before its first step never runs.
            task.add_done_callback(functools.partial(self._abort_if_cancelled, [q.request_id for q in own]))
            answers.append(task)
        return answers

    async def progress(self) -> int:
        """Tokens sampled since the start, of running requests too. Raises WorkerDied when the engine has ended."""
        self._running_engine()
        return self._tokens

    async def _submit(self, prompt: Prompt, sampling: Sampling) -> RequestOutputCollector:
        from vllm.inputs.engine import tokens_input

        number, self._requests = self._requests, self._requests + 1
        return await self._running_engine().add_request(
            str(number),
            tokens_input(prompt.token_ids.tolist(), cache_salt=self._salt(prompt)),
            sampling_params(prompt, sampling),
            priority=number,
        )

    def _salt(self, prompt: Prompt) -> str:
        if not self._shared:
            return str(self.version)
        size: int = self._running_engine().vllm_config.cache_config.block_size
        if len(prompt.token_ids) >= size:
            self._first_seen.setdefault(hash(prompt.token_ids[:size].tobytes()), self.version)
        return "any version"

    def _old_states(self, group: RolloutGroup, outputs: Sequence[Any]) -> int:
        """Prompts whose first blocks differ share no states; where they have been seen before, it may be all."""
        if not self._shared:
            return 0
        size: int = self._running_engine().vllm_config.cache_config.block_size
        version = group_info(group).min_version
        first = self._first_seen.get(hash(group.prompt.token_ids[:size].tobytes()), version)
        return max((output.num_cached_tokens or 0 for output in outputs), default=0) if first < version else 0

    async def _collect(
        self, prompt: Prompt, sampling: Sampling, queues: Sequence[RequestOutputCollector]
    ) -> RolloutGroup:
        with self._failures():
            outputs: list[Any] = [await queue.get() for queue in queues]
        group = to_group(prompt, sampling, outputs, self.name)
        group = replace(group, old_states=self._old_states(group, outputs))
        return self._with_whole_texts(group) if prompt.prefix_tokens else group

    def _with_whole_texts(self, group: RolloutGroup) -> RolloutGroup:
        """Texts that begin with the part of the response that the prompt ends with."""
        prompt = group.prompt
        prefix = prompt.token_ids[len(prompt.token_ids) - prompt.prefix_tokens :]
        tokenizer = self._running_engine().get_tokenizer()
        rollouts = tuple(
            replace(r, text=tokenizer.decode(np.concatenate([prefix, r.token_ids]).tolist(), skip_special_tokens=True))
            for r in group.rollouts
        )
        return replace(group, rollouts=rollouts)

    def _abort_if_cancelled(self, request_ids: list[str], task: asyncio.Task[RolloutGroup]) -> None:
        if task.cancelled() and self._engine is not None:
            aborting = asyncio.create_task(self._engine.abort(request_ids, internal=True))
            self._aborting.add(aborting)
            aborting.add_done_callback(self._aborting.discard)

    # ---- weights ------------------------------------------------------------------------------------------------

    async def update(self, weights: PublishedWeights) -> UpdateReport:
        """Take a version of the weights, and check that the model then says what the learner's does.

        `weights.payload` is what `weights.engine` asks for: see `rlsys.rollouts.transfer`. In the report, `transfer_s`
        is the copy into shared memory (nothing over NCCL), `pause_s` the time to stop and to go on again, `load_s`
        checksum and loading (and receiving) in between: generation stands still for `pause_s + load_s`.

        Raises WeightUpdateError. A version that is refused (not the manifest's, older than the current one, damaged,
        or of another model) leaves the engine generating with the weights it has; one that fails half-way, differs in
        the probe, or is not loaded within `weights.timeout_s` ends the engine. Raises ModelMismatchError, and ends the
        engine, when the first version it takes arrives as it was sent and differs in the probe all the same.
        """
        async with self._updating:
            self._running_engine()
            self._refuse(weights)
            try:
                async with asyncio.timeout(self._config.weights.timeout_s):
                    return await self._take(weights)
            except _Refused as error:
                raise WeightUpdateError(
                    f"{self.name}: {error}; it goes on with version {self.version}", kind="checksum"
                ) from None
            except TimeoutError:
                limit = self._config.weights.timeout_s
                late = f"version {weights.version} was not loaded within weights.timeout_s={limit:g} s"
                self._end(late)
                raise WeightUpdateError(f"{self.name}: {late}") from None
            except (WeightUpdateError, ModelMismatchError) as error:
                self._end(str(error))
                raise
            except asyncio.CancelledError:
                self._end(f"the update to version {weights.version} was cancelled half-way")
                raise

    def _refuse(self, weights: PublishedWeights) -> None:
        version, described = weights.version, weights.manifest["version"]
        if described != version:
            raise WeightUpdateError(
                f"{self.name}: weights of version {version} came with a manifest of {described}", kind="version"
            )
        if version < self.version:
            raise WeightUpdateError(
                f"{self.name} has version {self.version} already, which is newer than {version}", kind="version"
            )
        if len(weights.probe.token_ids) < 2:
            raise WeightUpdateError(
                f"weights of version {version} have no probe: it needs 2 tokens or more", kind="probe"
            )
        self._expected.check(weights.manifest)

    async def _take(self, weights: PublishedWeights) -> UpdateReport:
        began = time.perf_counter()
        with self._transfer.staged(weights) as staged:
            transferred = time.perf_counter()
            async with self._scheduling:
                await self._pause(clear_cache=self._config.weights.kv_cache == "recompute")
                paused = time.perf_counter()
                try:
                    await self._load(weights, staged)
                except _Refused:
                    await self._resume()  # and after no other failure: the weights may be half loaded
                    raise
                loaded = time.perf_counter()
                probe = await self._submit_probe(weights.probe)
                await self._resume()
                resumed = time.perf_counter()
        return UpdateReport(
            generator=self.name,
            version=weights.version,
            transfer_s=transferred - began,
            pause_s=paused - transferred + resumed - loaded,
            load_s=loaded - paused,
            bytes=int(weights.manifest["bytes"]),
            probe_difference=await self._probe_difference(weights, probe),
        )

    async def _load(self, weights: PublishedWeights, staged: Any) -> None:
        from rlsys.weights.object_store import REFUSED

        try:
            await self._transfer.load(self._running_engine(), weights, staged)
        except Exception as error:  # vLLM passes on no more than the text of what was raised in the other process
            _, mark, reason = str(error).partition(REFUSED)
            if mark:
                raise _Refused(reason.strip()) from error
            raise WeightUpdateError(f"version {weights.version} failed to load: {error}") from error
        self.version = weights.version

    async def _submit_probe(self, probe: Probe) -> RequestOutputCollector:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(list(probe.token_ids))
        return await self._running_engine().add_request("probe", prompt, params, priority=PROBE_PRIORITY)

    async def _probe_difference(self, weights: PublishedWeights, queue: RequestOutputCollector) -> float:
        import vllm

        output: Any = await queue.get()
        found = np.array(output.prompt_logprobs.logprobs)  # the first token has none, the others one each
        model = self._running_engine().model_config
        engine = f"vLLM {vllm.__version__}, {model.architecture}"
        difference = check_probe(self.name, engine, weights, found, self._config.model.dtype, self._agreed)
        self._agreed = True
        return difference

    # ---- the engine ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the engine process; running calls raise WorkerDied. Closing twice is closing once."""
        self._end("it was closed")

    def _end(self, reason: str) -> None:
        self._gone = self._gone or reason
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.output_processor.propagate_error(WorkerDied(self.name, self._gone))
            engine.shutdown()

    def _running_engine(self) -> AsyncLLM:
        if self._gone is not None:
            raise WorkerDied(self.name, self._gone)
        if self._engine is None:
            raise EngineError(f"{self.name} has not been started")
        if self._engine.errored:  # vLLM tells those who wait for tokens; an update, or a pause, would wait for ever
            self._end(_ENDED)
            raise WorkerDied(self.name, _ENDED)
        return self._engine

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn vLLM's exceptions into ours."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            self._gone = self._gone or _ENDED
            raise WorkerDied(self.name, self._gone) from error
        except (VLLMClientError, ValueError) as error:
            raise EngineError(f"{self.name}: vLLM refuses a request: {error}") from error

    async def _pause(self, clear_cache: bool) -> None:
        # Below AsyncLLM.pause_generation, which sleeps for 20 ms after it to let outputs arrive. Nobody needs that
        # here.
        await self._running_engine().engine_core.pause_scheduler_async(mode="keep", clear_cache=clear_cache)

    async def _resume(self) -> None:
        await self._running_engine().resume_generation()

    def _count_tokens(self, engine: AsyncLLM) -> None:
        """Count the tokens of every engine step as it comes in: streaming outputs for that would cost a third of the
        speed."""
        process_outputs = engine.output_processor.process_outputs

        def counted(outputs: Any, *arguments: Any, **options: Any) -> Any:
            self._tokens += sum(len(output.new_token_ids) for output in outputs)
            return process_outputs(outputs, *arguments, **options)

        engine.output_processor.process_outputs = counted  # type: ignore[method-assign, assignment]


class _Refused(Exception):
    """An update was turned down with the old weights untouched."""
