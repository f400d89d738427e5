"""Where the figures of a run go: one file per tracker, all with the methods of `rlsys.roles.Tracker`.

    jsonl        RUN/metrics.jsonl, RUN/evals.jsonl     timeline    RUN/timeline.json, for chrome://tracing or Perfetto
    wandb        Weights & Biases, online or offline    console     live progress, or plain lines
    tensorboard  RUN/tensorboard                        prometheus  gauges of the Ray cluster

`Trackers` hands every call to all of them. To add one, add a file with such a class and a line in `open_trackers`.
"""

from __future__ import annotations

from rlsys.errors import RlsysError


class TrackerError(RlsysError):
    """A tracker cannot go on. The run goes on without it."""
