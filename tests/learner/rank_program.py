"""One learner rank in a process of its own, driven from a test over a connection. Run by `conftest.py`, never imported.

Arguments: address of the connection, rank, world size, folder for the rendezvous. Each message is the name of a
function below with its keyword arguments; each answer is ("ok", result) or ("error", exception).
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlsys.learner import checkpoint, distributed
from rlsys.learner.core import Learner
from rlsys.losses import LossInputs, TokenLoss
from rlsys.models.loading import load_tokenizer

held: dict[str, Any] = {}  # this rank's learner and device


def objective(inputs: LossInputs) -> TokenLoss:
    """Importance-weighted policy gradient, plus a KL term and an entropy bonus where there is what they need."""
    loss = -inputs.advantages * (inputs.logprobs - inputs.proximal_logprobs).exp()
    if inputs.reference_logprobs is not None:
        loss = loss + 0.05 * (inputs.logprobs - inputs.reference_logprobs).square()
    if inputs.entropy is not None:
        loss = loss - 0.01 * inputs.entropy
    return TokenLoss(torch.where(inputs.mask, loss, 0.0))


def build(**arguments: Any) -> None:
    if "learner" in held:
        held.pop("learner").close()
    held["learner"] = Learner(device=held["device"], **arguments)


def configure(**learner: Any) -> None:
    """Other micro-batches, packing and so on for the learner that is there."""
    held["learner"]._learner = held["learner"]._learner.model_copy(update=learner)


def attribute(name: str) -> Any:
    return getattr(held["learner"], name)


def advance() -> None:
    held["learner"].version += 1


def call(method: str, **arguments: Any) -> Any:
    return getattr(held["learner"], method)(**arguments)


def clipped(inputs: LossInputs) -> TokenLoss:
    """A ratio clipped from above: finite where the ratio overflows, though its gradient is not."""
    ratio = (inputs.logprobs - inputs.proximal_logprobs).exp()
    return TokenLoss(torch.where(inputs.mask, ratio.clamp(max=1.2), 0.0))


def update(objective: str = "objective", **arguments: Any) -> Any:
    return held["learner"].update(objective=globals()[objective], **arguments)


def poison() -> None:
    """Make one element of one parameter's next gradient NaN, on the last rank only."""
    if torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
        return
    parameter = next(p for p in held["learner"].model.parameters())

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient[5, 3] = torch.nan
        return gradient

    handle = parameter.register_hook(hook)


def save(directory: Path, tokenizer: Path, memory: dict[str, Any]) -> None:
    snapshot(memory)
    write(directory, tokenizer)


def snapshot(memory: dict[str, Any]) -> None:
    held["snapshot"] = checkpoint.snapshot(held["learner"], memory)
    for part in memory.values():  # as a part does that learns on
        part.clear()


def write(directory: Path, tokenizer: Path) -> None:
    if (copied := held.pop("snapshot")) is not None:
        checkpoint.write(copied, held["learner"].model, load_tokenizer(tokenizer), directory)


def draw() -> float:
    """The next number of the rank's own generator."""
    return float(torch.rand(()))


def load(directory: Path) -> Any:
    return checkpoint.load(held["learner"], directory)


def gradients(batch: Any, entropy: bool) -> dict[str, np.ndarray]:
    learner = held["learner"]
    rows = np.flatnonzero(batch.rollouts.mask_BT.any(axis=1))
    learner._accumulate(batch, rows, objective, True, entropy, True)
    out = {name: gradient.numpy() for name, gradient in learner.policy.gradients().items()}
    learner.policy.step(0.0, lambda finite: False)
    return out


def weights() -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy().copy() for name, tensor in held["learner"].policy.weights()}


def state(engine: str = "policy") -> dict[str, np.ndarray]:
    chosen = held["learner"].engines[engine]
    out = {name: tensor.numpy().copy() for name, tensor in chosen.state()}
    return {**out, "updates": np.array(chosen.updates)}


def main(address: str, rank: int, world_size: int, folder: Path) -> None:
    with Client(address, family="AF_UNIX") as connection:
        if rank == 0:
            store = distributed.open_rendezvous("127.0.0.1", 60)
            (folder / "port.part").write_text(str(store.port))
            (folder / "port.part").rename(folder / "port")
            connection.send(("ok", None))
        else:
            store = None
        connection.recv()  # the port is there
        port = int((folder / "port").read_text())
        held["device"] = distributed.join(
            "cpu", rank, world_size, "127.0.0.1", port, store=store, threads=1, timeout_s=60
        )
        connection.send(("ok", None))
        while (message := connection.recv()) is not None:
            name, arguments = message
            try:
                connection.send(("ok", globals()[name](**arguments)))
            except Exception as error:  # to be raised again in the test
                connection.send(("error", error))
        distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
