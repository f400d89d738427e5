"""A tiny Qwen3 with a character tokenizer, built from scratch and saved like any other Hugging Face checkpoint.

With a warm start it is first fitted to demonstrations, so that reinforcement learning has something to improve on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.config.models import TinyModelConfig, WarmStartConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = "\n" + "".join(sorted(set(string.printable[:95])))

# (prompt text, response text): the response is followed by the end-of-sequence token
Demonstrations = Iterator[tuple[str, str]]
Progress = Callable[[int, int, float], None]  # (step, steps, loss)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; everything else is `<unk>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=max_length
    )


def build_model(config: TinyModelConfig, max_length: int, seed: int) -> PreTrainedModel:
    """Random weights, float32, tied embeddings (as the small Qwen3 models have)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(CHARACTERS) + 3,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.key_value_heads,
                head_dim=config.head_dim,
                max_position_embeddings=max_length,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=None,
            )
        )


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Demonstrations,
    config: WarmStartConfig,
    progress: Progress | None = None,
) -> None:
    """Minimise the mean negative log-likelihood of the response tokens, with AdamW and a cosine schedule."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    # OneCycleLR divides by the length of its warm-up less one step, so that must be two steps or more.
    total = max(2, config.steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=total, pct_start=max(0.1, 2 / total)
    )
    model.train()
    for step in range(config.steps):
        pairs = [next(demonstrations) for _ in range(config.batch_size)]
        rows = [[*tokenizer.encode(prompt + response), tokenizer.eos_token_id] for prompt, response in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in rows])
        labels = ids.clone()
        for i, ((prompt, _), row) in enumerate(zip(pairs, rows, strict=True)):
            labels[i, : len(prompt)] = -100
            labels[i, len(row) :] = -100
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, config.steps, loss.item())
    model.eval()


def ensure_tiny_model(
    config: TinyModelConfig,
    max_length: int,
    demonstrations: Callable[[], Demonstrations],
    fingerprint: str,
    progress: Progress | None = None,
) -> Path:
    """The folder of the built model; built first if it is not cached.

    `fingerprint` identifies the demonstrations. The folder is written aside and renamed, so a half-built model is never
    found.
    """
    wanted = f"{config.model_dump_json()}|{max_length}|{fingerprint}"
    folder = Path(config.cache_dir) / f"tiny-qwen3-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        tokenizer = build_tokenizer(max_length)
        model = build_model(config, max_length, seed=config.warm_start.seed)
        if config.warm_start.steps:
            fit(model, tokenizer, demonstrations(), config.warm_start, progress)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        os.chmod(aside, 0o755)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder
