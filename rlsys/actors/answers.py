"""What an actor answers, or what its failure means to the driver."""

from __future__ import annotations

import re
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from rlsys.actors.processes import first_line
from rlsys.errors import HandleLost, RlsysError, WorkerDied


async def answer(worker: str, ref: Any) -> Any:
    """The value of a call of `worker`.

    Raises WorkerDied when its process is gone; HandleLost when what it was given is; what it raised itself when that is
    an RlsysError; and Ray's error, with the actor's traceback, for what nobody foresaw.
    """
    try:
        return await ref
    except RayActorError as error:
        raise WorkerDied(worker, _why(error)) from error
    except ObjectLostError as error:  # of the task's own, too: Ray makes classes that are both
        raise HandleLost(f"{worker} cannot have what it was given: {first_line(error)}") from error
    except RayTaskError as error:
        if isinstance(error.cause, RlsysError):
            raise error.cause from error
        raise


def _why(error: RayActorError) -> str:
    """What Ray knows of the end of a process, without its advice."""
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|\n|$)", str(error))
    return f"its process ended: {detail[1]}" if detail else first_line(error)


async def answer_or_death(worker: str, ref: Any) -> Any:
    """The same of a role that is of no use any more after what nobody foresaw: that is its death, and it is restarted.

    Out of memory, a device error, a broken connection between ranks.
    """
    try:
        return await answer(worker, ref)
    except RayTaskError as error:
        raise WorkerDied(worker, f"{type(error.cause).__name__}: {first_line(error.cause)}") from error
