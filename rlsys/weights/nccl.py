"""Arguments of vLLM's own NCCL weight-transfer engine (`weights.engine: nccl`, GPU profile).

**Not run yet**: written from the documentation of vLLM's API (`vllm.distributed.weight_transfer.nccl_engine`, 0.32),
on machines without a GPU. It is the receiving half. The payload of such a version holds no bytes but the place where
the two sides meet, `{"master_address": ..., "master_port": ..., "world_size": ...}`; the sender is NCCL rank 0 and
has to broadcast the tensors of the manifest, in its order and packed as vLLM's `NCCLTrainerWeightTransferEngine`
does, while the generator's update is running. There is no checksum of a broadcast: the probe of `PublishedWeights` is
what verifies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsys.errors import WeightUpdateError

BACKEND = "nccl"
RENDEZVOUS = ("master_address", "master_port", "world_size")


def init_info(payload: Any) -> dict[str, Any]:
    """vLLM's `NCCLWeightTransferInitInfo` for one generator: its workers follow the sender, which is rank 0.

    Raises WeightUpdateError when the payload is no rendezvous.
    """
    if not isinstance(payload, Mapping) or set(payload) != set(RENDEZVOUS):
        raise WeightUpdateError(
            f"weights.engine: nccl needs the sender's {', '.join(RENDEZVOUS)} as payload, not {type(payload).__name__}"
        )
    return {**payload, "rank_offset": 1, "packed": True}


def update_info(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's `NCCLWeightTransferUpdateInfo` for the tensors of a manifest."""
    tensors = manifest["tensors"]
    return {
        "names": [entry["name"] for entry in tensors],
        "dtype_names": [entry["dtype"] for entry in tensors],
        "shapes": [entry["shape"] for entry in tensors],
    }
