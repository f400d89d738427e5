"""Load causal language models and tokenizers from a folder in Hugging Face format (or a hub name), failing early.

`transformers` fills in missing weights at random with a mere warning; here that is an error.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.errors import DataError
from rlsys.models.staging import names_of
from rlsys.storage import is_url

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of `model.dtype`."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def check_folder(path: str | Path, *, weights: bool = True, tokenizer: bool = True) -> None:
    """Raise DataError unless `path` is a folder, or a URL of one, with the files asked for, or can be a hub name
    (`owner/name`).

    Reads file names only, so that a plan can be checked without loading anything.
    """
    folder = path if is_url(path) else Path(path)
    if isinstance(folder, Path):
        if not folder.exists() and not folder.is_absolute() and str(path).count("/") == 1 and str(path)[0] not in "./~":
            return  # a hub name: `transformers` answers for it
        if not folder.is_dir():
            raise DataError(
                f"model.path: there is no folder {folder}; give a folder in Hugging Face format, or a hub name"
            )
    names = names_of(folder)
    if "config.json" not in names:
        raise DataError(f"model.path: {folder} has no config.json, so it is not a model in Hugging Face format")
    if weights and not any(fnmatch.filter(names, pattern) for pattern in WEIGHT_PATTERNS):
        raise DataError(f"model.path: {folder} has no weights ({' or '.join(WEIGHT_PATTERNS)})")
    if tokenizer and not any(name in names for name in TOKENIZER_FILES):
        raise DataError(
            f"model.path: {folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); "
            "save one beside the weights with tokenizer.save_pretrained"
        )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`. Raises DataError when there is none that loads."""
    from transformers import AutoTokenizer

    check_folder(path, weights=False)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"model.path: the tokenizer in {path} does not load: {error}") from error
    return tokenizer


def load_causal_lm(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `path`, in evaluation mode, without dropout.

    Raises DataError when the folder, its config or its weights are missing or incomplete, and when the model does
    something to its logits after the output projection (soft-capping, scaling), which chunked scoring would leave out.
    """
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(path, tokenizer=False)
    transformers.utils.logging.disable_progress_bar()  # the console belongs to the caller
    try:
        config = AutoConfig.from_pretrained(str(path))
        without_dropout(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path), config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"model.path: the model in {path} does not load: {error}") from error
    model, info = loaded
    # `missing_keys` leaves out what is tied, such as lm_head to the embedding
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
        raise DataError(
            f"model.path: {path} has no fitting weights for {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        )
    model.eval()
    with torch.no_grad():
        ids = torch.arange(4)[None]
        direct = model(input_ids=ids, use_cache=False).logits
        projected = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.equal(direct, projected):
        raise DataError(
            f"model.path: {type(model).__name__} changes its logits after the output projection "
            f"(by up to {(direct - projected).abs().max().item():.3g}); such models are not supported"
        )
    return model


def without_dropout(config: Any) -> None:
    """Set every dropout rate of a model config to 0: the sampler has none, so the learner's policy must not either."""
    for name, value in vars(config).items():
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop")) or name == "dropout"):
            setattr(config, name, 0.0)
