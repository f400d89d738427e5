"""How a prompt is rolled out: one strategy per file."""
