"""Publish a version of the weights as one block of bytes; receive it inside vLLM."""
