"""Combiners of reward components: one class that extends `rlsys.advantages.Combiner` per file."""
