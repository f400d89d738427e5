"""Everything that can be known to be wrong before anything is started. `plan`, `train` and `eval` all run this."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.config.models import Config
from rlsys.config.plan import Facts, ModelSize, Plan, make_plan, this_machine, tiny_size
from rlsys.errors import ConfigError, DataError
from rlsys.models.loading import check_folder
from rlsys.models.staging import staged
from rlsys.storage import check_driver, is_url

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_LOOKED_AT = 256  # for the longest prompt


@dataclass(frozen=True, slots=True)
class Checked:
    plan: Plan
    algorithm: dict[str, Any]  # the preset with the config's changes, every option with its value
    departures: Sequence[tuple[str, Any, Any]]  # from what the preset wants elsewhere: (key, here, as published)


def check_config(config: Config) -> Checked:
    """What a config that can work comes to. Cheap questions come first.

    Raises ConfigError, DataError or RewardSetupError. Imports the reward functions in a child process, which is ended.
    """
    machine = this_machine(config)
    make_plan(config, Facts(), machine).check()
    urls = {"run.storage": config.run.storage, "model.path": config.model.path}
    urls |= {f"reference.{key}": getattr(config.reference, key) for key in ("path", "average_with")}
    for key, url in urls.items():
        if url is not None and is_url(url):
            check_driver(url, key)
    if config.model.path is not None:
        check_folder(config.model.path)
    if config.reference.path is not None:
        check_folder(config.reference.path, tokenizer=False)
    if config.reference.average_with is not None:
        check_folder(config.reference.average_with, tokenizer=False)

    from rlsys.algorithms.compose import Algorithm
    from rlsys.algorithms.presets import departures
    from rlsys.algorithms.rollout import bound_strategy

    algorithm = Algorithm.from_config(config.algorithm)
    if not algorithm.needs.reference:
        reference = config.reference
        for key, wanted in (("update", reference.update != "frozen"), ("average_with", bool(reference.average_with))):
            if wanted:
                raise ConfigError(
                    f"reference.{key}: the algorithm {config.algorithm.preset!r} compares with no reference; remove "
                    "the key, or add a part that does, such as the regulariser kl"
                )

    from rlsys.prompts.stream import PromptStream, eval_prompts
    from rlsys.rewards.check import check as check_rewards

    tokenizer = load_tokenizer(config)
    room = config.model.max_length - config.rollout.max_new_tokens
    stream = PromptStream.from_config(config.prompts.train, config.prompts, tokenizer, room, config.run.seed)
    rows = min(stream.size or _ROWS_LOOKED_AT, _ROWS_LOOKED_AT)
    longest = max(len(stream.draw(i).token_ids) for i in range(rows))
    demonstrated = algorithm.needs.expert or algorithm.needs.demonstrations
    if demonstrated and stream.draw(0).demonstration is None:
        raise ConfigError(
            f"algorithm: {config.algorithm.preset!r} learns from demonstrations, and prompts.train has none: name "
            "their key in prompts.train.demonstration_key (of a jsonl or huggingface source), or use the built-in sums"
        )
    curriculum = algorithm.curriculum
    if curriculum.needs_repeats and stream.size is None:
        raise ConfigError(
            f"algorithm.curriculum: {curriculum.name!r} goes by what came of a prompt before, and prompts.train never "
            "gives one twice: use a source of so many rows (jsonl, huggingface), or another curriculum"
        )
    curriculum.bind(stream, config.run.seed, config.rollout.samples_per_prompt)
    strategy = bound_strategy(algorithm, config, config.model.path or "")
    tasks = {config.prompts.train.task}
    held_out = None
    if config.prompts.eval is not None:
        tasks.add(config.prompts.eval.task)
        held_out = len(
            eval_prompts(
                config.prompts.eval, config.prompts, tokenizer, room, config.run.seed, count=config.eval.prompts
            )
        )
    check_rewards(config.rewards, sorted(tasks))
    facts = Facts(
        epochs=algorithm.epochs,
        minibatches=algorithm.minibatches,
        needs_reference=algorithm.needs.reference,
        needs_critic=algorithm.needs.values,
        needs_samples=algorithm.needs.samples,
        needs_expert=algorithm.needs.expert,
        train_rows=stream.size,
        eval_prompts=held_out,
        longest_prompt=longest,
        sampled_tokens=strategy.expected_tokens(config.rollout.samples_per_prompt) if strategy.branches else None,
        model=model_size(config),
    )
    plan = make_plan(config, facts, machine)
    plan.check()
    return Checked(plan, algorithm.resolved(), departures(config))


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the run's model; that of a tiny model, before it is built. Raises DataError."""
    if config.model.tiny is not None:
        from rlsys.models.tiny import build_tokenizer

        return build_tokenizer(config.model.max_length)
    from rlsys.models.loading import load_tokenizer as load

    assert config.model.path is not None
    return load(staged(config.model.path, weights=False))


def model_size(config: Config) -> ModelSize | None:
    """Read from the headers of the weight files; None when they are not on this machine or not safetensors."""
    if config.model.tiny is not None:
        from rlsys.models.tiny import CHARACTERS

        return tiny_size(config.model.tiny, vocabulary=len(CHARACTERS) + 3)
    folder = Path(config.model.path or "")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    try:
        described = json.loads((folder / "config.json").read_text())
        shape = described.get("text_config", described)
        return ModelSize(
            parameters=sum(map(_parameters, files)),
            layers=shape["num_hidden_layers"],
            hidden_size=shape["hidden_size"],
            vocabulary=shape["vocab_size"],
        )
    except (ValueError, KeyError, struct.error) as error:
        raise DataError(f"model.path: {folder} is not a model in Hugging Face format: {error!r}") from error


def _parameters(file: Path) -> int:
    """Elements of all tensors of a safetensors file: 8 bytes with the length of a JSON header, then the header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
