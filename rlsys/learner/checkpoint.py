"""The learner on disk, in a form that knows nothing of ranks and ZeRO stages.

    learner.json                 version, update counts, algorithm memory, RNG, and which file each tensor is in
    policy-00000.safetensors ... full float32 tensors: "param/NAME", "exp_avg/NAME", "exp_avg_sq/NAME"
    critic-00000.safetensors ... the same, with a critic
    hf/                          the policy and tokenizer as an ordinary Hugging Face checkpoint, in the model's type

Loading cuts the full tensors up again, so a checkpoint of one rank loads on two and one of ZeRO 0 loads with ZeRO 3. In
float32 nothing is rounded on the way, so a resumed run goes on bit for bit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlsys.errors import LearnerError
from rlsys.learner.core import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
SHARD_BYTES = 2 << 30


def save(
    learner: Learner, tokenizer: PreTrainedTokenizerBase, algorithm_state: Mapping[str, Any], directory: Path
) -> None:
    """Write everything below `directory`. Collective; rank 0 writes, a shard of 2 GiB at a time."""
    main = dist.get_rank() == 0
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: _write(engine.state(), directory, name, main) for name, engine in learner.engines.items()}
    weights = {name: tensor.cpu().clone() for name, tensor in learner.policy.weights()}
    if not main:
        return
    learner.model.save_pretrained(directory / "hf", state_dict=weights)
    tokenizer.save_pretrained(directory / "hf")
    content = {
        "format": FORMAT,
        "version": learner.version,
        "updates": {name: engine.updates for name, engine in learner.engines.items()},
        "files": files,
        "algorithm": algorithm_state,
        "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    (directory / "learner.json").write_text(json.dumps(content, indent=1))


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


def _write(tensors: Iterable[tuple[str, Tensor]], directory: Path, stem: str, main: bool) -> dict[str, str]:
    """Write `tensors` to files of about SHARD_BYTES; return the file of each. Only where `main`."""
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    count = 0

    def flush() -> None:
        nonlocal shard, count
        file = f"{stem}-{count:05d}.safetensors"
        save_file(shard, directory / file)
        places.update(dict.fromkeys(shard, file))
        shard, count = {}, count + 1

    for key, tensor in tensors:
        if main:
            shard[key] = tensor.cpu().contiguous()
            if sum(held.nbytes for held in shard.values()) >= SHARD_BYTES:
                flush()
    if shard:
        flush()
    return places
