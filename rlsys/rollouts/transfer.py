"""How new weights get into the engine: `weights.engine`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rlsys.config.models import Config
from rlsys.roles import PublishedWeights
from rlsys.weights import nccl
from rlsys.weights.shared_memory import shared

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class Transfer(Protocol):
    """One per engine."""

    def staged(self, weights: PublishedWeights) -> Any:
        """Context manager: what can be done while generation goes on. Gives what `load` is then called with."""
        ...

    async def load(self, engine: AsyncLLM, weights: PublishedWeights, staged: Any) -> None:
        """Have the paused engine take the weights. Raises whatever vLLM or the sender raises."""
        ...


def transfer(name: str, config: Config) -> Transfer:
    if config.weights.engine == "nccl":
        return Broadcast(name, config.rollout.engine.tensor_parallel)
    return SharedMemory(name)


class SharedMemory:
    """`object_store`: the payload, uint8 [bytes], is copied into memory that the engine process opens."""

    def __init__(self, name: str) -> None:
        self._name = name

    @contextmanager
    def staged(self, weights: PublishedWeights) -> Iterator[Mapping[str, Any]]:
        with shared(weights.payload, f"rlsys-{self._name}-{weights.version}") as path:
            yield {"path": path, "manifest": dict(weights.manifest)}

    async def load(self, engine: AsyncLLM, weights: PublishedWeights, staged: Mapping[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await engine.start_weight_update()
        await engine.update_weights(WeightTransferUpdateRequest(dict(staged)))
        await engine.finish_weight_update(weight_version=str(weights.version))


class Broadcast:
    """`nccl`: the payload is the `nccl.WeightSender`, which broadcasts while vLLM receives."""

    def __init__(self, name: str, workers: int) -> None:
        self._name = name
        self._workers = workers
        self._joined = False

    @contextmanager
    def staged(self, weights: PublishedWeights) -> Iterator[nccl.WeightSender]:
        yield weights.payload

    async def load(self, engine: AsyncLLM, weights: PublishedWeights, staged: nccl.WeightSender) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        if not self._joined:
            meeting = await staged.meet(self._name, self._workers)
            request = WeightTransferInitRequest(nccl.init_info(meeting))
            await asyncio.gather(engine.init_weight_transfer_engine(request), staged.join(self._name))
            self._joined = True
        await engine.start_weight_update()
        receive = engine.update_weights(WeightTransferUpdateRequest(nccl.update_info(weights.manifest)))
        await asyncio.gather(receive, staged.send(self._name, weights.version))
        await engine.finish_weight_update(weight_version=str(weights.version))
