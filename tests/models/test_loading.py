from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsys.errors import DataError
from rlsys.models.loading import check_folder, load_causal_lm, load_tokenizer


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_loads_model_and_tokenizer(tiny_model: Path) -> None:
    model = load_causal_lm(tiny_model, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_tokenizer(tiny_model).decode(load_tokenizer(tiny_model).encode("1+2")) == "1+2"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        load_causal_lm(tmp_path / "nothing", torch.float32)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        check_folder(tmp_path)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        load_causal_lm(copy, torch.float32)


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(copy)


def test_broken_weights(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="does not load"):
        load_causal_lm(copy, torch.float32)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(copy, torch.float32)


def test_dropout_is_off(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    assert load_causal_lm(copy, torch.float32).model.layers[0].self_attn.attention_dropout == 0.0


def test_logits_changed_after_the_projection_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="output projection"):
        load_causal_lm(tmp_path, torch.float32)


def test_a_hub_name_is_left_to_transformers() -> None:
    check_folder("some-owner/some-model")
