"""The reward functions, one per file."""
