"""Asynchronous actor-learner reinforcement learning for language models."""
