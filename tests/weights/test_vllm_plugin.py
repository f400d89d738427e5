"""What vLLM loads in each of its processes."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PROGRAM = """
import multiprocessing, os, signal

def child():
    from rlsys.weights.vllm_plugin import BACKEND, register
    register()
    register()  # vLLM may call it more than once
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    assert BACKEND in WeightTransferEngineFactory._registry
    print("pid", os.getpid(), flush=True)
    signal.pause()

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, name="EngineCore")
    process.start()
    process.join()
"""


def test_vllm_finds_the_plugin() -> None:
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="rlsys_weight_transfer")
    assert entry.value == "rlsys.weights.vllm_plugin:register"


@pytest.mark.slow
def test_an_engine_process_dies_with_its_parent(tmp_path: Path) -> None:
    # Under Ray it would die in any case, so without Ray here.
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = next(int(line.split()[1]) for line in parent.stdout if line.startswith("pid "))
        child = psutil.Process(pid)
        assert child.ppid() == parent.pid
        parent.kill()
        try:
            child.wait(timeout=20)
        except psutil.TimeoutExpired:
            child.kill()
            pytest.fail("the engine process outlived its parent")
