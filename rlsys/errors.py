"""One exception class per failure boundary. Each failure is attributed once, where it happens.

Messages name the key, row, file, role or process, and say what to do.
"""

from __future__ import annotations


class RlsysError(Exception):
    """Base of everything that rlsys raises on purpose.

    `kind` says in a word what was refused at a boundary, such as "log-probs" or "checksum", for those who count
    refusals; it is empty where something failed and nothing was refused.
    """

    def __init__(self, *args: object, kind: str = "") -> None:
        super().__init__(*args)
        self.kind = kind


class UserError(RlsysError):
    """The user can mend it: the command line prints the message alone and exits with 2."""


class ConfigError(UserError):
    """A key is unknown, of the wrong type, out of range, or the arithmetic of several cannot work."""


class DataError(UserError):
    """A data set, row, prompt or model folder is missing or malformed."""


class RewardSetupError(UserError):
    """A reward function cannot be imported, or is not one."""


class RewardError(UserError):
    """A reward function raised, hung or returned what it may not, and `rewards.on_failure` is "stop"."""


class RolloutError(UserError):
    """A group of rollouts was refused, and `rollout.on_refused` is "stop"."""


class ModelMismatchError(UserError):
    """A generator has the learner's weights, and not its log-probs: the two compute the model differently."""


class RunDirError(UserError):
    """The run directory belongs to another config, or is in use."""


class DiskFullError(UserError):
    """No room is left for a file of the run. What was good before still is, and the same command goes on."""


class StorageError(RlsysError):
    """What is behind a URL (`run.storage`, `model.path`) cannot be read or written. The same command goes on."""


class DamagedFileError(StorageError):
    """A file in a storage is missing, or is not what was put there."""


class ClusterError(RlsysError):
    """A Ray cluster cannot be reached, or refuses what it is asked for."""


class PlacementError(ClusterError):
    """The cluster has no room for a worker; the message says what was asked, what there is, and what is missing."""


class EngineError(RlsysError):
    """A generation engine failed."""


class BadRollout(EngineError):
    """A group was refused that nobody can have sampled as it was asked for. `generator` made it."""

    def __init__(self, message: str, *, kind: str = "", generator: str = "") -> None:
        super().__init__(message, kind=kind)
        self.generator = generator


class WeightUpdateError(EngineError):
    """A weight update was not taken: wrong checksum, shape, version, or past its deadline."""


class LearnerError(RlsysError):
    """The learner cannot go on."""


class NonFiniteError(LearnerError):
    """A step would have applied a non-finite gradient; nothing was applied. Names the samples."""


class SegmentError(RlsysError):
    """A response cannot be cut as it was asked for; it costs the prompt, not the run."""


class HandleLost(RlsysError):
    """What a handle pointed to is gone, with the node that had it: to be made or read again."""


class WorkerDied(RlsysError):
    """The process behind a role ended. `worker` is its name, such as "generator-0"."""

    def __init__(self, worker: str, cause: str) -> None:
        super().__init__(f"{worker} died: {cause}")
        self.worker = worker
        self.cause = cause

    def __reduce__(self) -> tuple[type[WorkerDied], tuple[str, str]]:
        return type(self), (self.worker, self.cause)


class WorkerStalled(WorkerDied):
    """A worker made no progress within its lease and was given up."""


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception of a group that is not itself a group."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
