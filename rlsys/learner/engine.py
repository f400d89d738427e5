"""One DeepSpeed engine: a model, its optimizer, and full tensors in and out whatever the ZeRO stage.

What DeepSpeed is trusted with: partitioning, gathering and reducing. What is ours: the loss scale (one global sum),
clipping and refusal (`GuardedAdamW`), the learning rate, and the form of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlsys.config.models import LearnerConfig, OptimizerConfig
from rlsys.errors import ConfigError, LearnerError
from rlsys.learner.optimizer import GuardedAdamW, Update
from rlsys.models.logprobs import ChunkedHead

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(learner: LearnerConfig, dtype: torch.dtype, elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Raises ConfigError for a combination that DeepSpeed cannot run as asked."""
    if dtype != torch.float32 and learner.zero_stage == 0:
        raise ConfigError(
            "learner.zero_stage: 0 keeps no float32 master weights for model.dtype bfloat16; use 1, 2 or 3"
        )
    if learner.offload and learner.zero_stage < 2:
        raise ConfigError(f"learner.offload: needs learner.zero_stage 2 or 3, not {learner.zero_stage}")
    # buffers of this size are allocated at once, so not larger than the model; DeepSpeed wants a multiple of 2
    bucket = min(elements + elements % 2, 200_000_000)
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": dtype != torch.float32,
        # one sub-group, hence one optimizer step per update, which is what makes refusing it all-or-nothing
        "sub_group_size": 10**15,
    }
    if learner.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # unused: micro-batches are cut by tokens, and the boundary is set by hand
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # done in GuardedAdamW, on one norm for all stages; DeepSpeed's default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


class Engine:
    """Wraps `model` on this rank. Every method is collective: all ranks call it, in the same order.

    `names` maps the module's parameter names to those used in checkpoints and in published weights.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        optimizer: OptimizerConfig,
        learner: LearnerConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        import deepspeed

        self._stage = learner.zero_stage
        self._device = device
        model.to(device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.elements = sum(p.numel() for p in parameters)
        if self._stage == 3:
            # parameters of the head are gathered once per forward, not once per chunk: ranks differ in chunks
            heads = [m for m in model.modules() if isinstance(m, ChunkedHead)]
            if heads:
                deepspeed.utils.set_z3_leaf_modules(model, [ChunkedHead])
        self._adamw = GuardedAdamW(parameters, optimizer, partitioned=self._stage > 0, device=device)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._adamw,
            config=deepspeed_config(learner, dtype, self.elements),
            dist_init_required=False,
        )
        self._parameters = [(names[name], p) for name, p in model.named_parameters()]
        partitions = self._engine.optimizer.fp32_partitioned_groups_flat if self._stage == 3 else ()
        self._adamw.create_state(partitions)
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    # ---- updates ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; over all micro-batches and ranks the losses add up to one global sum.

        `last` is True for the last micro-batch of an update, on all ranks at once.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over the ranks
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, learning_rate: float, agree: Callable[[bool], bool]) -> Update:
        """Apply the accumulated gradient, or nothing; either way it is gone afterwards.

        `agree` is called once with whether this gradient is finite, and says whether it is to be applied. All ranks
        must come to the same answer; the norm is global, so they do when `agree` uses nothing else.
        """
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.arm(agree)
        try:
            self._engine.step()
        finally:
            self._adamw.disarm()
        if self._adamw.update is None:  # DeepSpeed's own check, on the same global norm, found it not finite
            agree(False)
            return Update(False, float("nan"))
        return self._adamw.update

    # ---- full tensors -----------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) in the model's type, on rank 0; other ranks take part and yield nothing.

        The tensors are good until the next update. Under ZeRO 3 they are copies in host memory, because the whole model
        need not fit on one device.
        """
        import deepspeed

        for name, parameter in self._parameters:
            if self._stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.data.to("cpu", copy=True) if dist.get_rank() == 0 else None
                if whole is not None:
                    yield name, whole
            elif dist.get_rank() == 0:
                yield name, parameter.data

    def gradients(self) -> dict[str, Tensor]:
        """The full accumulated gradients by name, float32; between the last `backward` and `step` only."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(p).detach().float().clone() for name, p in self._parameters}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """(`"param/NAME"`, `"exp_avg/NAME"` or `"exp_avg_sq/NAME"`, full float32 tensor), on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._parameters:
            if self._stage == 0:
                yield f"param/{name}", parameter.detach()
                for key in MOMENTS:
                    yield f"{key}/{name}", self._adamw.state[parameter][key]
                continue
            yield f"param/{name}", safe_get_full_fp32_param(parameter)
            for key in MOMENTS:
                yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)

    @property
    def updates(self) -> int:
        """Updates applied so far: AdamW's step count."""
        states = list(self._adamw.state.values())
        return int(states[0]["step"].item()) if states else 0

    @torch.no_grad()
    def load_state(self, get: Callable[[str], Tensor], updates: int) -> None:
        """Take over what `state` gave, from any number of ranks and any ZeRO stage. `get(key)` is one full tensor."""
        for name, parameter in self._parameters:
            for key in ("param", *MOMENTS):
                value = get(f"{key}/{name}")
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if value.shape != shape:
                    raise LearnerError(
                        f"checkpoint: {key}/{name} has shape {tuple(value.shape)}, the model has {tuple(shape)}"
                    )
                self._set(parameter, key, value.to(self._device, torch.float32))
        for state in self._adamw.state.values():
            state["step"].fill_(updates)
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        import deepspeed
        from deepspeed import utils

        if self._stage == 0:
            target = parameter if key == "param" else self._adamw.state[parameter][key]
            target.copy_(value)
        elif self._stage == 3:
            # the setters for full tensors do not pad the last rank's partition
            size = cast(Any, parameter).ds_tensor.numel()
            part = torch.zeros(size, device=self._device)
            own = value.flatten()[dist.get_rank() * size : (dist.get_rank() + 1) * size]
            part[: own.numel()] = own
            if key == "param":
                utils.safe_set_local_fp32_param(parameter, part)
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if dist.get_rank() == 0:
                        parameter.data.copy_(value)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key == "param":
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def close(self) -> None:
        self._engine.destroy()
