"""Policy losses: one class that extends `rlsys.losses.Loss` per file."""
