"""AdamW that refuses gradients that are not finite, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlsys.config.models import OptimizerConfig
from rlsys.errors import LearnerError


@dataclass(frozen=True, slots=True)
class Update:
    """What became of one optimizer update. `grad_norm` is the global norm before clipping, maybe not finite."""

    applied: bool
    grad_norm: float


class GuardedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) with clipping by the global norm, all or nothing over all ranks.

    DeepSpeed calls `step` once per update, with the reduced gradients of this rank's partition (`partitioned`) or of
    the whole model. The sum of squares is added up over the ranks in float64, so every rank comes to the same norm and
    the same decision; a refused step leaves parameters, moments and step count untouched, bit for bit.

    Before `arm` is called, `step` only creates the (zero) state: DeepSpeed takes steps of its own while it is set up.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], config: OptimizerConfig, *, partitioned: bool, device: torch.device
    ) -> None:
        # The learning rate is set before each step. Zero until then: nothing can move by accident.
        super().__init__(params, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
        self._max_norm = config.max_grad_norm
        self._partitioned = partitioned
        self._device = device
        self._agree: Callable[[bool], bool] | None = None
        self.update: Update | None = None

    def arm(self, agree: Callable[[bool], bool]) -> None:
        """Allow one step. `agree` is told whether the gradient is finite and has the last word."""
        self._agree = agree
        self.update = None

    def disarm(self) -> None:
        self._agree = None

    def create_state(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        """Zero moments and step count for `parameters` and all in groups, as AdamW's first step would create them."""
        for parameter in [*parameters, *(p for group in self.param_groups for p in group["params"])]:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.create_state()
        if self._agree is None:
            return
        if self.update is not None:
            raise LearnerError("DeepSpeed split one update into several optimizer steps; nothing guards those")
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        for gradient in gradients:
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().to(self._device)
        if self._partitioned:
            dist.all_reduce(squares)
        norm = squares.sqrt().item()
        applied = self._agree(math.isfinite(norm))
        self.update = Update(applied, norm)
        if not applied:
            return
        if norm > self._max_norm:
            torch._foreach_mul_(gradients, self._max_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        super().step()


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (0, 1, ...) of `steps`.

    A linear warm-up ends at the full rate with step `warmup_steps - 1`; `linear` and `cosine` then come down to
    `final_fraction` of it with the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * left)
