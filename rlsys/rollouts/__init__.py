"""Sample rollouts: vLLM in `engine`, a small stand-in with the same interface in `fake`."""
