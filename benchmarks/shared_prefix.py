"""Training on rows that begin alike: as a prefix tree, over plain rows of the same batch."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.common import Result, tiny_model

TOKENS = 512  # of a row
GROUPS = 2


def batch(samples: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of which the first `share` is their group's; the prompt is an eighth of a row at most."""
    rng = np.random.default_rng(seed)
    common = int(TOKENS * share)
    prompt = max(1, min(common, TOKENS // 8))
    rows = []
    for _ in range(GROUPS):
        start = rng.integers(3, 40, common)
        rows += [np.concatenate([start, rng.integers(3, 40, TOKENS - common)]) for _ in range(samples)]
    ids = np.stack(rows)
    return ids, np.full(len(ids), prompt), np.full(len(ids), TOKENS - prompt)


def run(rounds: int) -> Result:
    """CPU time of one thread; bytes are those that the forward pass keeps for the backward pass."""
    import torch

    from rlsys.models.loading import load_causal_lm
    from rlsys.models.logprobs import PolicyModel
    from rlsys.models.prefixes import forest

    torch.set_num_threads(1)
    policy = PolicyModel(load_causal_lm(tiny_model(), torch.float32))
    rows, figures = [], {}
    for samples in (4, 16):
        for share in (0.125, 0.5, 0.75, 0.9):
            arrays = batch(samples, share)
            tensors = [torch.from_numpy(array) for array in arrays]
            found = {
                packing: min(_step(policy, tensors, packing) for _ in range(max(2, rounds // 3)))
                for packing in ("padded", "shared")
            }
            bound = arrays[0].size / forest(*arrays).ids.size
            speed = found["padded"][0] / found["shared"][0]
            memory = found["padded"][1] / found["shared"][1]
            rows.append(
                (
                    f"{samples} rows, {share:.0%} shared",
                    f"{speed:.2f} times as fast",
                    f"{memory:.2f} times less kept; tokens fed: {bound:.2f} times fewer",
                )
            )
            figures[f"{samples}/{share}"] = {"speed": speed, "memory": memory, "bound": bound}
    return Result(
        "shared_prefix",
        f"Shared prefixes: forward and backward pass over {GROUPS} groups of rows of {TOKENS} tokens, over plain rows",
        tuple(rows),
        figures,
    )


def _step(policy: Any, tensors: list[Any], packing: str) -> tuple[float, int]:
    import torch

    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    policy.zero_grad()
    started = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = policy(
            *tensors, width=int(tensors[2].max()), chunk=4096, temperature=1.0, entropy=False, packing=packing
        )
    logprobs.sum().backward()
    return time.process_time() - started, sum(kept.values())
