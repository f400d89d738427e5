"""Off-policy corrections: one class that extends `rlsys.losses.Correction` per file."""
