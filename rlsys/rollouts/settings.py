"""vLLM's arguments and environment, from a `Config`."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config.models import Config
from rlsys.config.plan import generator_threads
from rlsys.errors import ConfigError
from rlsys.registry import nearest
from rlsys.weights import nccl, vllm_plugin

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs

_GIB = 2**30


def threads(config: Config) -> int:
    """CPU threads of one engine, as the plan says."""
    return generator_threads(config, config.resources.cores or len(os.sched_getaffinity(0)))


def prepare_environment(config: Config, environment: MutableMapping[str, str]) -> None:
    """Set what vLLM and its child processes read from the environment. The process should hold one engine only."""
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if (plugins := environment.get("VLLM_PLUGINS")) and "rlsys_weight_transfer" not in plugins.split(","):
        environment["VLLM_PLUGINS"] = f"{plugins},rlsys_weight_transfer"
    if config.profile == "gpu":
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        return
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings here are about what a CPU does not have
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # cores are shared with the learner
    environment["OMP_NUM_THREADS"] = str(threads(config))  # Ray sets 1, or the actor's num_cpus
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # do not burn a core that another process could use
    # One small function of vLLM is compiled even in eager mode: 3-12 s at the first request, and a C++ compiler needed.
    environment["TORCH_COMPILE_DISABLE"] = "1"
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and it would override rollout.engine.kv_cache_gib


def engine_args(config: Config, model_path: str | Path) -> AsyncEngineArgs:
    """Raises ConfigError when `rollout.engine.extra` holds what vLLM does not know or what is not to be changed."""
    from vllm import AsyncEngineArgs

    engine = config.rollout.engine
    backend = nccl.BACKEND if config.weights.engine == "nccl" else vllm_plugin.BACKEND
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "dtype": config.model.dtype,
        "max_model_len": config.model.max_length,
        "max_num_seqs": engine.max_num_seqs,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if config.profile == "cpu":
        arguments |= _cpu_arguments(config)
    else:
        arguments |= {
            "gpu_memory_utilization": engine.gpu_memory_utilization,
            "tensor_parallel_size": engine.tensor_parallel,
        }
    fixed = {
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from: after the temperature
        "scheduling_policy": "priority",  # first come, first served; the probe of new weights before them
        "weight_transfer_config": {"backend": backend},
    }
    known = set(AsyncEngineArgs.__dataclass_fields__)
    for key in engine.extra:
        if key in fixed or key == "model":
            raise ConfigError(f"rollout.engine.extra.{key}: this one is set by rlsys; take it out")
        if key not in known:
            raise ConfigError(
                f"rollout.engine.extra.{key}: vLLM has no such engine argument{nearest(key, sorted(known))}"
            )
    return AsyncEngineArgs(**{**arguments, **engine.extra, **fixed})


def _cpu_arguments(config: Config) -> dict[str, Any]:
    if config.weights.engine == "nccl":
        raise ConfigError("weights.engine: nccl needs profile: gpu; on profile cpu use object_store")
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(config.rollout.engine.kv_cache_gib * _GIB),
        # The model in the engine's own process: one process less. The name "uni" would be turned into "mp" on CPU.
        "distributed_executor_backend": UniProcExecutor,
        # A seeded request whose prompt is cut into chunks ends vLLM's CPU engine ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(2048, config.model.max_length),
    }
