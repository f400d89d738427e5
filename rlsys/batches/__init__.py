"""Scored groups to arrays, arrays to what the learner consumes, and rows to ranks and micro-batches.

`collate` makes the `RolloutBatch` that advantages are estimated from, `build_train_batch` the `TrainBatch` of one
optimizer step, and `split` the micro-batches in which the ranks work through it. All of it is numpy, without torch.
"""

from rlsys.batches.arrays import build_train_batch, collate, select_rows
from rlsys.batches.splits import cost, minibatches, split

__all__ = ["build_train_batch", "collate", "cost", "minibatches", "select_rows", "split"]
