"""Adjustments of advantages: one class that extends `rlsys.advantages.Adjustment` per file."""
