"""Models as files: load a Hugging Face checkpoint, build the tiny one, score tokens in chunks."""
