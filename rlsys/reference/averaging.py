"""Averages of weights: of two models, or of the policy over time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlsys.errors import DataError


@torch.no_grad()
def blend(weights: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float, what: str) -> None:
    """weights <- share * weights + (1 - share) * other, in place; computed in float32, rounded once.

    With share = 0 they are `other`, bit for bit. Raises DataError, naming the first tensor, unless both have the same
    names and shapes; nothing is changed then. `what` says where `other` comes from.
    """
    check_alike(weights, other, what)
    for name, tensor in weights.items():
        new = other[name].to(tensor.device)
        tensor.copy_(new if share == 0 else share * tensor.float() + (1 - share) * new.float())


def check_alike(weights: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Raise DataError unless both have the same names and shapes."""
    for name in sorted(weights.keys() | other.keys()):
        here = tuple(weights[name].shape) if name in weights else "missing"
        there = tuple(other[name].shape) if name in other else "missing"
        if here != there:
            raise DataError(
                f"{what} cannot be averaged with the reference: {name} is {there} there and {here} in the reference; "
                "both must be of the same base model"
            )
