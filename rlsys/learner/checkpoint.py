"""The learner on disk, in a form that knows nothing of ranks and ZeRO stages.

    learner.json                 version, update counts, algorithm memory, RNG, and which file each tensor is in
    policy-00000.safetensors ... full float32 tensors: "param/NAME", "exp_avg/NAME", "exp_avg_sq/NAME"
    critic-00000.safetensors ... the same, with a critic
    hf/                          the policy and tokenizer as an ordinary Hugging Face checkpoint, in the model's type

Loading cuts the full tensors up again, so a checkpoint of one rank loads on two and one of ZeRO 0 loads with ZeRO 3. In
float32 nothing is rounded on the way, so a resumed run goes on bit for bit.

`snapshot` copies, between two steps; `write` writes the copy, while the next steps are trained.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlsys.durable import sync_tree, writing
from rlsys.errors import LearnerError
from rlsys.learner.core import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1
SHARD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that has state, in host memory, as it was between two steps."""

    version: int
    updates: Mapping[str, int]  # by engine
    tensors: Mapping[str, dict[str, Tensor]]  # by engine, then by key: full, contiguous, float32
    algorithm: Mapping[str, Any]
    rng: bytes


def snapshot(learner: Learner, algorithm_state: Mapping[str, Any]) -> Snapshot | None:
    """Copy everything that has state; None on ranks other than 0. Collective.

    Rank 0 holds 12 bytes per parameter in host memory until they are written, float32 weights and two moments (the same
    again for a critic), and one more tensor while it copies.
    """
    main = dist.get_rank() == 0
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, engine in learner.engines.items():
        held = tensors.setdefault(name, {})
        for key, tensor in engine.state():  # every rank takes part
            if main:
                held[key] = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
    if not main:
        return None
    return Snapshot(
        version=learner.version,
        updates={name: engine.updates for name, engine in learner.engines.items()},
        tensors=tensors,
        algorithm=copy.deepcopy(dict(algorithm_state)),
        rng=torch.get_rng_state().numpy().tobytes(),
    )


def write(snapshot: Snapshot, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a snapshot below `directory`, 2 GiB at a time, letting go of each tensor when it is written.

    Neither collective nor in the way of training: of `model` only its class and config are used. With a model in
    bfloat16 its weights are rounded for hf/ first, another 2 bytes per parameter. Raises DiskFullError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        key.removeprefix("param/"): tensor.to(model.dtype)
        for key, tensor in snapshot.tensors["policy"].items()
        if key.startswith("param/")
    }
    with writing(directory / "hf"):
        model.save_pretrained(directory / "hf", state_dict=weights)
        tokenizer.save_pretrained(directory / "hf")
    del weights
    content = {
        "format": FORMAT,
        "version": snapshot.version,
        "updates": snapshot.updates,
        "files": {name: _write(tensors, directory, name) for name, tensors in snapshot.tensors.items()},
        "algorithm": snapshot.algorithm,
        "rng": base64.b64encode(snapshot.rng).decode(),
    }
    path = directory / "learner.json"
    with writing(path):
        path.write_text(json.dumps(content, indent=1))
    with writing(directory):
        sync_tree(directory)


def load(learner: Learner, directory: Path) -> Mapping[str, Any]:
    """Load what `save` wrote, and return the algorithm's state. Collective.

    Raises LearnerError for a checkpoint that is incomplete or of another model.
    """
    try:
        content = json.loads((directory / "learner.json").read_text())
    except (OSError, ValueError) as error:
        raise LearnerError(f"checkpoint {directory}: learner.json cannot be read: {error}") from error
    if content["format"] != FORMAT:
        raise LearnerError(f"checkpoint {directory}: format {content['format']}, this version reads {FORMAT}")
    if set(content["files"]) != set(learner.engines):
        raise LearnerError(
            f"checkpoint {directory}: it holds {' and '.join(content['files'])}, the config asks for "
            f"{' and '.join(learner.engines)}; give algorithm.critic as it was"
        )
    for name, engine in learner.engines.items():
        places = content["files"][name]
        with ExitStack() as stack:
            try:
                opened = {
                    file: stack.enter_context(safe_open(directory / file, framework="pt"))
                    for file in set(places.values())
                }
            except (OSError, SafetensorError) as error:
                raise LearnerError(f"checkpoint {directory}: {error}") from error

            def get(key: str, places: Mapping[str, str] = places, opened: Mapping[str, Any] = opened) -> Tensor:
                if key not in places:
                    raise LearnerError(f"checkpoint {directory}: no tensor {key}; it is of another model")
                tensor: Tensor = opened[places[key]].get_tensor(key)
                return tensor

            engine.load_state(get, content["updates"][name])
    learner.version = content["version"]
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(content["rng"])), dtype=torch.uint8))
    algorithm: Mapping[str, Any] = content["algorithm"]
    return algorithm


def _write(tensors: dict[str, Tensor], directory: Path, stem: str) -> dict[str, str]:
    """Move `tensors` to files of about SHARD_BYTES; return the file of each."""
    places: dict[str, str] = {}
    for count in itertools.count():
        shard: dict[str, Tensor] = {}
        while tensors and sum(held.nbytes for held in shard.values()) < SHARD_BYTES:
            key = next(iter(tensors))
            shard[key] = tensors.pop(key)
        if not shard:
            break
        file = f"{stem}-{count:05d}.safetensors"
        with writing(directory / file):
            save_file(shard, directory / file)
        places.update(dict.fromkeys(shard, file))
    return places
