"""Weights that turn per-token losses into one number: one class that extends `rlsys.losses.Aggregation` per file."""
