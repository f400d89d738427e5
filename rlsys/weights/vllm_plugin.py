"""What vLLM loads in every process it starts (entry point `vllm.general_plugins` in pyproject.toml).

It makes our weight-transfer engine known there, and ties the life of vLLM's engine process to that of the process which
started it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading

BACKEND = "rlsys_object_store"


def register() -> None:
    """Register the engine; may be called more than once. Light: it is called in every process that uses vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "rlsys.weights.object_store", "ObjectStoreWeightTransferEngine"
        )
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.current_process().name.startswith("EngineCore"):
        _die_with(parent)


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Kill this process as soon as `parent` is gone.

    vLLM's engine process does not notice the death of its client and would keep its memory for ever. Not by
    PR_SET_PDEATHSIG: that signal comes when the *thread* ends which started this process.
    """

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()
