"""The receiving side of `weights.engine: object_store`, inside vLLM's worker process.

vLLM imports this module by name where it needs it (see `vllm_plugin`), so vllm is imported at the top here and nowhere
else in the package. The worker is no Ray worker: the generator fetches the payload from the object store and passes
it on in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlsys.errors import WeightUpdateError
from rlsys.weights.publish import unpack, verify
from rlsys.weights.shared_memory import attach

REFUSED = "weights refused:"  # in the message of an update that was turned down before anything was touched


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`path` is where the payload can be opened, `manifest` is that of `rlsys.weights.publish.pack`."""

    path: str
    manifest: Mapping[str, Any]


class ObjectStoreWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Checks the bytes, then loads them through vLLM's layerwise reload.

    A payload that fails its check is refused before the model is touched, so the old weights stay in use. Reloading
    layer by layer is needed because linear layers are repacked when a model is loaded (on CPU always), and a bare
    `load_weights` would write into packed memory.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        # The reload starts in `receive_weights`, after the bytes were checked: from its start on, the old weights are
        # gone.
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the inherited one: it ends with torch.accelerator.synchronize(), which fails where there is no
        # accelerator.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        payload = attach(update_info.path)
        try:
            verify(payload, update_info.manifest)
        except WeightUpdateError as error:
            raise ValueError(f"{REFUSED} {error}") from None
        with torch.no_grad():
            load_weights: Any = self.model.load_weights  # every model of vLLM has it; nn.Module does not say so
            initialize_layerwise_reload(self.model)
            load_weights(iter(unpack(payload, update_info.manifest).items()))
            finalize_layerwise_reload(self.model, self.model_config)
            _retie_output_head(self.model)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _retie_output_head(model: torch.nn.Module) -> None:
    """Give an output head that shares the input embedding's weights the new ones.

    No tensor is loaded for a tied head, so the layerwise reload leaves it alone: it keeps the parameter it had, and
    on CPU a packed copy of that, and the model goes on answering with the old head and no complaint.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.platforms import current_platform

    if not getattr(model.config, "tie_word_embeddings", False):
        return
    embeddings = [
        layer
        for layer in model.modules()
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    ]
    heads = [layer for layer in model.modules() if isinstance(layer, ParallelLMHead)]
    for head in heads if embeddings else []:  # a pipeline stage has one or the other, or none
        head.weight = embeddings[0].weight
        if current_platform.is_cpu():
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)
