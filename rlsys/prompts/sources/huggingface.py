"""Prompts from a Hugging Face data set: of the hub, or a local folder or file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.config.models import HuggingFaceSource
from rlsys.errors import DataError
from rlsys.prompts import RawPrompt
from rlsys.prompts.rows import raw_prompt, source_name

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


class HuggingFaceRows:
    """All rows are read and checked at once, so that a bad one is found before a run starts."""

    generated = False

    def __init__(self, config: HuggingFaceSource) -> None:
        self.name = source_name(config.path)
        self.task = config.task
        self._config = config
        self._rows = self._read(_load(config))
        self.size = len(self._rows)

    def row(self, i: int) -> RawPrompt:
        return self._rows[i]

    def where(self, i: int) -> str:
        return f"{self._config.path} split {self._config.split} row {i}"

    def _read(self, dataset: Dataset) -> list[RawPrompt]:
        config = self._config
        optional = [key for key in (config.answer_key, config.demonstration_key) if key]
        wanted = {config.prompt_key, *config.metadata_keys, *optional}
        if wanted <= set(dataset.column_names):  # else the first row says what is missing
            dataset = dataset.select_columns(sorted(wanted))
        if config.limit is not None:
            dataset = dataset.take(min(config.limit, len(dataset)))
        return [
            raw_prompt(
                *(row, config.prompt_key, config.answer_key, config.metadata_keys, self.where(i)),
                config.demonstration_key,
            )
            for i, row in enumerate(dataset)
        ]


def _load(config: HuggingFaceSource) -> Dataset:
    from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()  # they would run through the live display
    path = Path(config.path)
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():  # by save_to_disk
            loaded = load_from_disk(str(path))
        elif path.is_file():
            if path.suffix not in _BUILDERS:
                raise DataError(
                    f"{path}: ends in none of {', '.join(_BUILDERS)}, so there is no telling how to read it"
                )
            # A single file has no splits: all of it is the split that was asked for.
            loaded = load_dataset(_BUILDERS[path.suffix], data_files={config.split: str(path)}, split=config.split)
        else:
            loaded = load_dataset(config.path, config.subset, split=config.split)
    except DataError:
        raise
    except Exception as error:
        # The library raises anything from FileNotFoundError to its own and the hub client's errors.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{config.path}: `datasets` cannot load it (split {config.split!r}): {reason}") from error
    if isinstance(loaded, DatasetDict):
        if config.split not in loaded:
            raise DataError(f"{config.path}: no split {config.split!r}; there are {', '.join(loaded)}")
        loaded = loaded[config.split]
    if not isinstance(loaded, Dataset):
        raise DataError(f"{config.path}: loads as a {type(loaded).__name__}, not as a data set with rows by number")
    return loaded
