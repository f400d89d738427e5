"""Where a response is cut: one rule per file."""
