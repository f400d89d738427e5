"""Fixtures that several packages share. Expensive ones live as long as the session."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test depends on how fast the machine is; those that need more examples ask for them.
settings.register_profile("rlsys", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rlsys")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small untrained Qwen3 (character tokenizer, 256 positions) in Hugging Face format."""
    from rlsys.config.models import TinyModelConfig, WarmStartConfig
    from rlsys.models.tiny import ensure_tiny_model

    config = TinyModelConfig(
        hidden_size=64,
        intermediate_size=128,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=32,  # vLLM has no attention for smaller ones on CPU
        cache_dir=str(tmp_path_factory.mktemp("models")),
        warm_start=WarmStartConfig(steps=0),
    )
    return ensure_tiny_model(config, max_length=256, demonstrations=lambda: iter(()), fingerprint="untrained")
