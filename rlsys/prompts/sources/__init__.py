"""The prompt sources, one per file, and the one place that picks among them."""

from __future__ import annotations

from rlsys.config.models import HuggingFaceSource, JsonlSource, ReasoningGymSource, SumsSource
from rlsys.prompts import PromptSource
from rlsys.prompts.sources.huggingface import HuggingFaceRows
from rlsys.prompts.sources.jsonl import JsonlRows
from rlsys.prompts.sources.reasoning_gym import ReasoningGymRows
from rlsys.prompts.sources.sums import SumsRows


def open_source(config: SumsSource | JsonlSource | HuggingFaceSource | ReasoningGymSource) -> PromptSource:
    """Open a source; files are read here. Raises DataError when one is missing, empty or malformed."""
    match config:
        case SumsSource():
            return SumsRows(config)
        case JsonlSource():
            return JsonlRows(config)
        case HuggingFaceSource():
            return HuggingFaceRows(config)
        case ReasoningGymSource():
            return ReasoningGymRows(config)
