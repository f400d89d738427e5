"""What a config means for vLLM; the arguments themselves are tested with the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsys.rollouts.settings import prepare_environment, threads
from rlsys.weights import nccl


@pytest.mark.parametrize(
    ("cores", "generators", "given", "wanted"), [(2, 1, None, 1), (16, 2, None, 4), (4, 8, None, 1), (16, 2, 3, 3)]
)
def test_threads(make_config: Any, cores: int, generators: int, given: int | None, wanted: int) -> None:
    rollout = {"generators": generators, "engine": {"threads": given}}
    assert threads(make_config(Path("m"), resources={"cores": cores}, rollout=rollout)) == wanted


def test_the_environment_of_the_cpu_profile(make_config: Any) -> None:
    # Ray sets the first, a user may have set the others.
    environment = {"OMP_NUM_THREADS": "7", "VLLM_CPU_KVCACHE_SPACE": "40", "VLLM_PLUGINS": "other"}
    prepare_environment(make_config(Path("m")), environment)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["VLLM_PLUGINS"] == "other,rlsys_weight_transfer"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_the_environment_of_the_gpu_profile_leaves_threads_alone(make_config: Any) -> None:
    environment: dict[str, str] = {}
    prepare_environment(make_config(Path("m"), profile="gpu"), environment)
    assert not any("OMP" in key or "CPU" in key or "COMPILE" in key for key in environment)


def test_nccl_arguments() -> None:
    place = {"master_address": "10.0.0.1", "master_port": 29500, "world_size": 3}
    assert nccl.init_info(place) == {**place, "rank_offset": 1, "packed": True}
    manifest = {"tensors": [{"name": "a", "dtype": "bfloat16", "shape": [2, 3], "offset": 0, "bytes": 12}]}
    assert nccl.update_info(manifest) == {"names": ["a"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}
